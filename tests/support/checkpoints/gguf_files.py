"""Writes tiny random models as GGUF files with the `gguf` package's writer, as llama.cpp's converter does, in any of ggml's types.

Types that the package cannot make (Q4_K and others of 256 weights) get random blocks. Knows nothing of `workers`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

from support.checkpoints.tiny import make_tiny_model

# The types of which the package has a `quantize`.
QUANTIZABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0")
# In a block: where its float16 numbers are, and which of them is a scale; random bytes elsewhere are a valid block.
RANDOM_BLOCKS = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
}
# Sizes that hold whole blocks of 256 weights.
LARGE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}


def write_gguf(
    path: Path,
    model: Any = None,
    *,
    dtype: str | Mapping[str, str] = "Q4_0",
    metadata: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    tensors: Mapping[str, np.ndarray] | None = None,
    split_max_tensors: int = 0,
    architecture: str = "llama",
) -> Path:
    """The file, or the first part with split_max_tensors. model: of transformers, by default of `make_tiny_model`, without a window.

    dtype: of all matrices, or {"embed": ..., "down_proj": ..., "": of the others} by a part of Hugging Face's names. metadata: changed
    keys; None leaves one out. without, tensors: tensors that are left out and added, by llama.cpp's names.
    """
    model = model or make_tiny_model(sliding_window=None)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    rope = config.rope_parameters
    fields = {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": rope["rope_theta"],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    } | dict(metadata or {})
    for key, value in fields.items():
        _add(writer, key.replace("llama.", f"{architecture}."), value)
    rng = np.random.default_rng(0)
    for name, parameter in model.state_dict().items():
        gguf_name = gguf_name_of(name)
        if gguf_name in without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        weight = parameter.detach().float()
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            weight = interleave(weight, config.head_dim)
        kind = "F32" if weight.dim() == 1 else dtype if isinstance(dtype, str) else _kind_of(name, dtype)
        data = encode(weight.numpy(), kind, rng=rng)
        writer.add_tensor(gguf_name, data, raw_dtype=GGMLQuantizationType[kind])
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else next(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def read_reference(path: Path) -> dict[str, torch.Tensor]:
    """{llama.cpp's name: its floats}, dequantised by the package, of all parts."""
    parts = sorted(path.parent.glob(path.name.replace("-00001-of-", "-*-of-"))) if "-of-" in path.name else [path]
    return {
        tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for part in parts
        for tensor in gguf.GGUFReader(part).tensors
    }


def dequantized_model(path: Path, model: Any) -> Any:
    """`model`, with the weights that the file has, as transformers computes it."""
    reference = read_reference(path)
    state = {}
    for name, parameter in model.state_dict().items():
        known_as = gguf_name_of(name)
        if known_as not in reference:  # a tied head
            continue
        weight = reference[known_as].view(parameter.shape)
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            weight = deinterleave(weight, model.config.head_dim)
        state[name] = weight
    model.load_state_dict(state, strict=not model.config.tie_word_embeddings)
    return model.eval()


def encode(weight: np.ndarray, dtype: str, *, rng: np.random.Generator) -> np.ndarray:
    """As the file has it: bytes, or floats of that type."""
    if dtype not in RANDOM_BLOCKS:
        return gguf.quantize(weight, GGMLQuantizationType[dtype])
    return random_blocks(dtype, weight.shape, rng=rng)


def random_blocks(dtype: str, shape: tuple[int, ...], *, rng: np.random.Generator) -> np.ndarray:
    """[rows, bytes of a row] uint8. The weights are near 0.1, as large as those of a tiny model."""
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block_size, block_bytes), dtype=np.uint8)
    # The largest number that each type multiplies its scale with.
    largest = {"Q2_K": 45, "Q3_K": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4096, "IQ4_NL": 127, "IQ4_XS": 4064}
    for offset in RANDOM_BLOCKS[dtype]:
        scale = rng.uniform(0.1, 0.3, blocks.shape[:-1]) / largest.get(dtype, 200)
        blocks[..., offset : offset + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def gguf_name_of(name: str) -> str:
    """llama.cpp's, of Hugging Face's."""
    for old, new in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.up_proj", "ffn_up"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ):
        name = name.replace(old, new)
    return name


def interleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Hugging Face's order of rows to llama.cpp's. Per head of 4: [a0, a1, b0, b1] becomes [a0, b0, a1, b1]."""
    return weight.view(-1, 2, head_dim // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    return weight.view(-1, head_dim // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _kind_of(name: str, dtypes: Mapping[str, str]) -> str:
    return next((kind for part, kind in dtypes.items() if part and part in name), dtypes.get("", "F32"))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
