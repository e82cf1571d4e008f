"""The header of a safetensors file: which tensors it has, of which type and shape, and where. Checked against the file's size.

Reads no weights, so a 7B model takes milliseconds. Knows the format; no model. A file is 8 bytes with the header's length, the header in
JSON, and the tensors' bytes: {"norm.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}} is followed by 8 bytes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.checkpoint.regular_file import shown
from workers.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Also of what quantised checkpoints have.
DTYPE_BYTES = FLOAT_BYTES | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
DOWNLOAD_AGAIN = "Download it again; `hf download` continues where it stopped."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is. start, end: its bytes, counted from the beginning of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header's bytes, and its tensors by name. `file` is known to be a regular file. Raises CheckpointError, which names it."""
    try:
        num_bytes = file.stat().st_size
        with file.open("rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(
                    f"{file} is a Git LFS pointer, not the weights.", remedy="Run `git lfs pull` in its folder."
                )
            if len(start) < 8 or length > min(num_bytes - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} ({num_bytes / 2**20:,.1f} MiB) is not a safetensors file, or is truncated in its header.",
                    remedy=DOWNLOAD_AGAIN,
                )
            header = f.read(length)
    except OSError as e:
        raise CheckpointError(
            f"{file} cannot be read: {e.strerror}.", remedy="Give read permission to the user that runs Ray."
        ) from e
    try:
        tensors = _tensors(file, json.loads(header, object_pairs_hook=_without_duplicates), 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f": {e}" if isinstance(e, _InvalidHeaderError) else ""
        raise CheckpointError(f"{file} does not have a valid safetensors header{reason}.", remedy=DOWNLOAD_AGAIN) from e
    expected = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if num_bytes != expected:
        what = "truncated" if num_bytes < expected else "longer than its header says"
        raise CheckpointError(
            f"{file} is {what}: it has {num_bytes:,} bytes instead of {expected:,}.", remedy=DOWNLOAD_AGAIN
        )
    return header, tensors


class _InvalidHeaderError(ValueError):
    """What is wrong, without the file."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _InvalidHeaderError(f"it has {shown(next(n for n in names if names.count(n) > 1))} twice")
    return found


def _tensors(file: Path, header: dict[str, Any], base: int) -> dict[str, TensorInfo]:
    tensors = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or end < start:
            raise _InvalidHeaderError(f"the tensor {shown(name)} has an impossible shape or place")
        if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != end - start:
            raise _InvalidHeaderError(
                f"the tensor {shown(name)} has {end - start:,} bytes, which its shape does not need"
            )
        tensors[name] = TensorInfo(file, str(dtype), shape, base + start, base + end)
    last = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != last:
            what = "overlaps the one before it" if tensor.start < last else "leaves a gap before it"
            raise _InvalidHeaderError(f"the tensor {shown(name)} {what}")
        last = tensor.end
    return tensors
