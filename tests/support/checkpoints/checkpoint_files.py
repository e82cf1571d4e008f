"""Writes the files of a small checkpoint without torch, so that a test can damage each byte of them. Its weights are zero."""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.paths import DEMO_MODEL
from workers.checkpoint.model_config import load_model_config
from workers.weights.names import expected_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 4096,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
WEIGHTS = "model.safetensors"


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A complete checkpoint with the demo model's tokenizer. changes: of config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    shutil.copy(DEMO_MODEL / "tokenizer.model.v3", folder)
    write_weights(folder / WEIGHTS, headers_of(folder))
    return folder


def headers_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The header that the folder's configuration asks for."""
    header, at = {}, 0
    for name, shape in expected_shapes(load_model_config(folder)).items():
        num_bytes = 2
        for size in shape:
            num_bytes *= size
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    return header


def write_weights(path: Path, header: Mapping[str, Any] | bytes, *, num_bytes: int | None = None) -> None:
    """num_bytes: of the zeros after the header; by default as many as it says."""
    if not isinstance(header, bytes):
        if num_bytes is None:
            num_bytes = max(tensor["data_offsets"][1] for tensor in header.values())
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes or 0))
