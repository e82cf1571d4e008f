"""Whether a checkpoint folder is complete, by its configuration, its index and the first bytes of each safetensors file.

Reads no weights: a 7B model takes milliseconds. Knows the safetensors format and what a layer is named; the loader later proves shapes.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.doctor.facts import Fault, Model
from cluster.doctor.words import sentence_and_remedy, size
from workers.config import ModelConfig, load_model_config
from workers.errors import CheckpointError, ConfigError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
AGAIN = "Download it again; `hf download` continues where it stopped."


class _BadFileError(Exception):
    def __init__(self, sentence: str, remedy: str = AGAIN) -> None:
        super().__init__(sentence)
        self.fault = Fault(sentence=sentence, remedy=remedy)


def read_model(folder: str) -> Model:
    """Never raises: what is wrong is in `faults`."""
    from workers.weights.files import weight_files

    path = Path(folder)
    if not path.is_dir():
        fault = Fault(
            sentence=f"The model folder {folder} does not exist here.",
            remedy="Every node that holds ranks needs the files at the same path: copy them there, or put them on a shared disk.",
        )
        return Model(folder=folder, faults=(fault,))
    try:
        config = load_model_config(path)
        files = weight_files(path, config.layout)
    except (ConfigError, CheckpointError) as e:
        return Model(folder=folder, faults=(_said(e),))
    faults: list[Fault] = []
    tensors: dict[str, Path] = {}
    digest = hashlib.sha256(_config_bytes(path))
    for file in files:
        try:
            header = read_header(file)
        except _BadFileError as e:
            faults.append(e.fault)
            continue
        digest.update(f"{file.name} {file.stat().st_size}".encode() + header)
        tensors |= dict.fromkeys(_names(json.loads(header)), file)
    if not faults:
        faults += _check_index(path, config, tensors)
        faults += _check_layers(config, tensors)
    faults += _check_tokenizer(path, config)
    return Model(
        folder=folder,
        num_files=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        bytes_per_weight=BYTES_PER_WEIGHT[config.dtype],
        fingerprint=digest.hexdigest()[:16],
        faults=tuple(faults),
    )


def read_header(file: Path) -> bytes:
    """The JSON at a safetensors file's beginning, checked against the file's size. Raises _BadFileError, which names the file."""
    num_bytes = file.stat().st_size
    try:
        with file.open("rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise _BadFileError(
                    f"{file} is a pointer of Git LFS, not the weights.", "Run `git lfs pull` in its folder."
                )
            if len(start) < 8 or length > min(num_bytes - 8, MAX_HEADER_BYTES):
                raise _BadFileError(f"{file} ({size(num_bytes)}) is truncated in its header, or no safetensors file.")
            header = f.read(length)
        ends = [tensor["data_offsets"][1] for tensor in _names(json.loads(header)).values()]
        expected = 8 + length + max(ends, default=0)
    except OSError as e:
        raise _BadFileError(
            f"{file} cannot be read: {e.strerror}.", "Give the user that Ray runs as the right to."
        ) from e
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise _BadFileError(f"{file} has a header that is not safetensors'.") from e
    if num_bytes != expected:
        what = "truncated" if num_bytes < expected else "longer than its header says"
        raise _BadFileError(f"{file} is {what}: {num_bytes:,} bytes, where {expected:,} belong.")
    return header


def _names(header: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _check_index(folder: Path, config: ModelConfig, tensors: Mapping[str, Path]) -> list[Fault]:
    """What the index promises and its files do not have; `weight_files` has seen that it can be read."""
    from workers.weights.files import INDEXES

    index = folder / INDEXES[config.layout]
    if not index.is_file():
        return []
    promised: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = [name for name, file in promised.items() if name not in tensors or tensors[name].name != file]
    if not missing:
        return []
    first = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    sentence = f"{index.name} says that {promised[first]} has the tensor {first!r}{more}, which it has not."
    return [Fault(sentence=sentence, remedy=f"The files are of different downloads or revisions. {AGAIN}")]


def _check_layers(config: ModelConfig, tensors: Mapping[str, Path]) -> list[Fault]:
    """A whole file that nobody downloaded shows as layers that are missing, or have less in them than others."""
    layers: dict[int, set[str]] = {}
    for name in tensors:
        if (match := re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(.+)", name)) is not None:
            layers.setdefault(int(match[1]), set()).add(match[2])
    whole = set().union(*layers.values()) if layers else set()
    bad = [i for i in range(config.num_hidden_layers) if layers.get(i, set()) != whole or not whole]
    if not bad:
        return []
    sentence = (
        f"Of {config.num_hidden_layers} layers {len(bad)} are incomplete in these files, the first is layer {bad[0]}."
    )
    return [Fault(sentence=sentence, remedy=f"A file of weights is missing. {AGAIN}")]


def _check_tokenizer(folder: Path, config: ModelConfig) -> list[Fault]:
    from cluster.text.tokenizer import load_tokenizer  # late: SentencePiece is needed for this only

    try:
        load_tokenizer(folder, model_vocab_size=config.vocab_size)
    except ConfigError as e:
        return [_said(e)]
    return []


def _said(error: ConfigError | CheckpointError) -> Fault:
    sentence, remedy = sentence_and_remedy(error, otherwise="Name a checkpoint that Tramontane supports, complete.")
    return Fault(sentence=sentence, remedy=remedy)


def _config_bytes(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for name in ("config.json", "params.json") if (p := folder / name).is_file())
