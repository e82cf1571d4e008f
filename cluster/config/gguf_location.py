"""Which GGUF file MODEL and --gguf-file mean, in a folder or among the names in a Hub repository. Downloads nothing, reads no file."""

import glob
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from workers.checkpoint.gguf.gguf_file import SUFFIX, find_gguf, first_part, only_model, part_names
from workers.errors import ConfigError


def local_gguf(location: Path, gguf_file: str | None) -> Path | None:
    """The file, or the first part, that an existing folder or file means; None if it is a checkpoint of another kind.

    Raises ConfigError for a folder with several, or without the one that --gguf-file names.
    """
    if gguf_file is None:
        return find_gguf(location)
    if not location.is_dir():
        raise ConfigError(
            f"--gguf-file has no effect, because {location} is a file itself.",
            remedy="Leave it out.",
            param="--gguf-file",
        )
    check_name(gguf_file)
    file = location / gguf_file
    if not file.exists():
        raise _missing(gguf_file, (path.name for path in location.glob(f"*{SUFFIX}")), where=str(location))
    return first_part(file)


def choose_gguf(names: Iterable[str], gguf_file: str | None, *, where: str) -> str | None:
    """The same for the names of a repository's files: None if it has other weights, or none. `where` names it."""
    names = list(names)
    ggufs = [name for name in names if name.endswith(SUFFIX)]
    if gguf_file is not None:
        check_name(gguf_file)
        if gguf_file not in ggufs:
            raise _missing(gguf_file, ggufs, where=where)
        return first_part(Path(gguf_file)).as_posix()
    if not ggufs or any(name.endswith(".safetensors") for name in names):
        return None
    return only_model(ggufs, folder=where).relative_to(where).as_posix()


def all_parts_in(folder: Path, gguf_file: str) -> bool:
    """Whether a folder of the Hub's cache has them."""
    return all((folder / gguf_file).with_name(name).exists() for name in part_names(Path(gguf_file).name))


def gguf_patterns(gguf_file: str) -> list[str]:
    """All parts of a file, as patterns for the Hub's client."""
    return [glob.escape(Path(gguf_file).with_name(name).as_posix()) for name in part_names(Path(gguf_file).name)]


def check_name(gguf_file: str) -> None:
    """Raises ConfigError for what is not the name of a GGUF file within the folder."""
    path = PurePosixPath(gguf_file)
    if path.suffix != SUFFIX or path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"--gguf-file {gguf_file} is not the name of a GGUF file in MODEL.",
            remedy=f"Give a name that ends with {SUFFIX}.",
            param="--gguf-file",
        )


def _missing(gguf_file: str, names: Iterable[str], *, where: str) -> ConfigError:
    models = sorted({first_part(Path(name)).as_posix() for name in names})
    listed = ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    return ConfigError(
        f"{where} has no file {gguf_file}.",
        remedy=f"Use one of {listed}." if models else "It has no GGUF files: leave --gguf-file out.",
        param="--gguf-file",
    )
