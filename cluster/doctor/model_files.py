"""Whether a checkpoint folder is complete, judged by its configuration, its index and the header of each safetensors file.

Reads no weights, so a 7B model takes milliseconds. Knows the safetensors format and the names of layers; the loader checks shapes.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.doctor.amounts import format_bytes
from cluster.doctor.facts import Fault, Model
from workers.config import ModelConfig, load_model_config
from workers.errors import CheckpointError, ConfigError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
DOWNLOAD_AGAIN = "Download it again; `hf download` continues where it stopped."
CHECKPOINT_REMEDY = "Use a complete checkpoint that Tramontane supports."


class _BadFileError(Exception):
    def __init__(self, message: str, *, remedy: str = DOWNLOAD_AGAIN) -> None:
        super().__init__(message)
        self.fault = Fault(message=message, remedy=remedy)


def read_model(folder: str) -> Model:
    """Reads the folder on this machine. Never raises for what is wrong with it: that is in `faults`."""
    from workers.weights.files import weight_files

    path = Path(folder)
    if not path.is_dir():
        fault = Fault(
            message=f"The model folder {folder} does not exist on this node.",
            remedy="Copy the files to the same path on every node that runs ranks, or put them on a shared disk.",
        )
        return Model(folder=folder, faults=(fault,))
    try:
        config = load_model_config(path)
        files = weight_files(path, config.layout)
    except (ConfigError, CheckpointError) as e:
        return Model(folder=folder, faults=(_fault(e),))
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
    """The JSON header of a safetensors file, checked against the file's size. Raises _BadFileError, which names the file."""
    num_bytes = file.stat().st_size
    try:
        with file.open("rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise _BadFileError(
                    f"{file} is a Git LFS pointer, not the weights.", remedy="Run `git lfs pull` in its folder."
                )
            if len(start) < 8 or length > min(num_bytes - 8, MAX_HEADER_BYTES):
                raise _BadFileError(
                    f"{file} ({format_bytes(num_bytes)}) is not a safetensors file, or is truncated in its header."
                )
            header = f.read(length)
        ends = [tensor["data_offsets"][1] for tensor in _names(json.loads(header)).values()]
        expected = 8 + length + max(ends, default=0)
    except OSError as e:
        raise _BadFileError(
            f"{file} cannot be read: {e.strerror}.", remedy="Give read permission to the user that runs Ray."
        ) from e
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise _BadFileError(f"{file} does not have a valid safetensors header.") from e
    if num_bytes != expected:
        what = "truncated" if num_bytes < expected else "longer than its header says"
        raise _BadFileError(f"{file} is {what}: it has {num_bytes:,} bytes instead of {expected:,}.")
    return header


def _names(header: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _check_index(folder: Path, config: ModelConfig, tensors: Mapping[str, Path]) -> list[Fault]:
    """Tensors that the index lists and the files lack. `weight_files` has already checked that the index can be read."""
    from workers.weights.files import INDEXES

    index = folder / INDEXES[config.layout]
    if not index.is_file():
        return []
    listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = [name for name, file in listed.items() if name not in tensors or tensors[name].name != file]
    if not missing:
        return []
    first = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    message = f"{index.name} lists the tensor {first!r}{more} in {listed[first]}, which does not have it."
    return [Fault(message=message, remedy=f"The files come from different downloads or revisions. {DOWNLOAD_AGAIN}")]


def _check_layers(config: ModelConfig, tensors: Mapping[str, Path]) -> list[Fault]:
    """Finds a missing file without an index: layers are absent, or have fewer tensors than the others."""
    layers: dict[int, set[str]] = {}
    for name in tensors:
        if (match := re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(.+)", name)) is not None:
            layers.setdefault(int(match[1]), set()).add(match[2])
    complete = set().union(*layers.values()) if layers else set()
    bad = [i for i in range(config.num_hidden_layers) if layers.get(i, set()) != complete or not complete]
    if not bad:
        return []
    message = (
        f"{len(bad)} of {config.num_hidden_layers} layers are incomplete in these files; the first is layer {bad[0]}."
    )
    return [Fault(message=message, remedy=f"A weight file is missing. {DOWNLOAD_AGAIN}")]


def _check_tokenizer(folder: Path, config: ModelConfig) -> list[Fault]:
    from cluster.text.tokenizer import load_tokenizer  # late: only this check needs SentencePiece

    try:
        load_tokenizer(folder, model_vocab_size=config.vocab_size)
    except ConfigError as e:
        return [_fault(e)]
    return []


def _fault(error: ConfigError | CheckpointError) -> Fault:
    return Fault(message=error.message, remedy=error.remedy or CHECKPOINT_REMEDY)


def _config_bytes(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for name in ("config.json", "params.json") if (p := folder / name).is_file())
