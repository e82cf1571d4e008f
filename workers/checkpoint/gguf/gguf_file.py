"""The header of a GGUF file: its metadata, and which tensors it has, of which type and shape, and where. Checked against the file's size.

Reads through the `gguf` package's reader; knows no model and no torch. The package makes two arrays for each string of a list, 1.5 s for a
vocabulary of 50,000, so this reader takes lists in one pass (20 ms). It also says what is wrong with a damaged file, which the package does
not. A model may be split: name-00001-of-00003.gguf has the metadata, and each part its tensors.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.checkpoint.regular_file import find_regular_file, shown
from workers.errors import CheckpointError, ConfigError

DOWNLOAD_AGAIN = "Download it again; `hf download` continues where it stopped."
SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is. dtype: as ggml names it, "Q4_K". shape: rows first, as torch has it. start, end: its bytes in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """metadata: {"llama.block_count": 30, "tokenizer.ggml.tokens": ["<s>", ...]}. header_bytes: the length of all before the tensors."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    header_bytes: int


def find_gguf(location: Path) -> Path | None:
    """The GGUF file, or the first part of one, that a location means: the file itself, or the only one in a folder without safetensors.

    None if the location is another kind of checkpoint. Raises ConfigError for a folder with several models.
    """
    if location.is_dir():
        files = sorted(location.glob(f"*{SUFFIX}"))
        if not files or any(location.glob("*.safetensors")):
            return None
        return only_model([file.name for file in files], folder=location)
    return first_part(location) if location.suffix == SUFFIX else None


def only_model(names: list[str], *, folder: Path | str) -> Path:
    """The one model among GGUF files, its first part if it is split. A part for images (mmproj) is none. Raises ConfigError."""
    models = sorted({first_part(Path(name)).name for name in names if "mmproj" not in name.lower()})
    if len(models) != 1:
        listed = ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
        what = f"has {len(models)} GGUF models ({listed})" if models else "has no GGUF file of a language model"
        raise ConfigError(f"{folder} {what}.", remedy="Name one with --gguf-file.", param="--gguf-file")
    return Path(folder) / models[0]


def first_part(file: Path) -> Path:
    """model-00002-of-00003.gguf -> model-00001-of-00003.gguf; a file that is not a part stays."""
    match = _PART.fullmatch(file.name)
    return file if match is None else file.with_name(f"{match['stem']}-00001-of-{match['count']}{SUFFIX}")


def model_name(file: Path) -> str:
    """The name to serve a checkpoint under: of a folder its own, of a file without its number as a part and without its suffix."""
    if file.suffix != SUFFIX:
        return file.name
    match = _PART.fullmatch(file.name)
    return file.stem if match is None else match["stem"]


def part_names(name: str) -> list[str]:
    """The names of all parts; of a whole file, its own."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{i:05d}-of-{count:05d}{SUFFIX}" for i in range(1, count + 1)]


def gguf_files(file: Path) -> list[Path]:
    """All parts of a file, in order. Raises CheckpointError for a missing one, ConfigError for what is not a regular file."""
    names = part_names(file.name)
    missing = [name for name in names if find_regular_file(file.parent, name) is None]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{file.parent / missing[0]}{more} does not exist"
            + (f", one of the {len(names)} parts of this model." if len(names) > 1 else "."),
            remedy="Put all parts into the same folder." if len(names) > 1 else "Give an existing file.",
        )
    return [file.parent / name for name in names]


def read_gguf(file: Path) -> GgufHeader:
    """Of one file: a part has its own tensors only, and only the first has all metadata. Raises CheckpointError, which names the file."""
    from workers.checkpoint.gguf.gguf_reader import (
        DamagedError,
        QuickReader,
    )  # late: the package imports a lot, for half a second

    try:
        num_bytes = file.stat().st_size
        with file.open("rb") as f:
            start = f.read(8)
    except OSError as e:
        raise CheckpointError(
            f"{file} cannot be read: {e.strerror}.", remedy="Give read permission to the user that runs Ray."
        ) from e
    if start == b"version ":
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the weights.", remedy="Run `git lfs pull` in its folder."
        )
    if start[:4] != _MAGIC or len(start) < 8:
        raise CheckpointError(f"{file} ({num_bytes:,} bytes) is not a GGUF file.", remedy=DOWNLOAD_AGAIN)
    version = struct.unpack("<I", start[4:])[0]
    if version not in (2, 3):
        what = "is in big-endian byte order" if version & 0xFFFF == 0 else f"is of GGUF version {version}"
        raise CheckpointError(
            f"{file} {what}, which is not supported.", remedy="Use a little-endian file of version 2 or 3."
        )
    try:
        reader = QuickReader(file)
    except DamagedError as e:
        raise CheckpointError(f"{file} {e}.", remedy=e.remedy or DOWNLOAD_AGAIN) from e
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error) as e:
        raise CheckpointError(
            f"{file} is damaged, or truncated in its header ({shown(str(e))}).", remedy=DOWNLOAD_AGAIN
        ) from e
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {e}.", remedy="Check its permissions.") from e
    tensors = {
        name: GgufTensor(file, dtype, shape, start, end) for name, (dtype, shape, start, end) in reader.places.items()
    }
    return GgufHeader(metadata=reader.metadata, tensors=tensors, header_bytes=int(reader.data_offset))
