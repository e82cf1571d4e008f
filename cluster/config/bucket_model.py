"""A checkpoint in a bucket (s3://, gs://, az:// or what else fsspec reads), as a folder on this machine.

Downloads the files that a checkpoint consists of, once: a file that is there with the bucket's size is kept. Credentials and regions are
those of the bucket's own library. Knows no format of weights. `python -m cluster.config.bucket_model ADDRESS FOLDER [WITHOUT]` fills a
folder, in the init container of a pod.
"""

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from workers.errors import ConfigError

_EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}


def is_bucket(model: str) -> bool:
    """Whether MODEL is an address instead of a path or a Hub id."""
    return re.match(r"[a-z][a-z0-9+.-]*://.", model) is not None


def cache_folder(url: str) -> Path:
    """Where the files of this address are kept: below XDG_CACHE_HOME, or HF_HOME, which containers mount as a volume."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("HF_HOME") or Path.home() / ".cache"
    name = PurePosixPath(url.rstrip("/")).name
    return Path(base) / "tramontane" / "models" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def download(url: str, patterns: Sequence[str], *, to: Path | None = None, without: str = "") -> Path:
    """The folder with all files at the address that match one of `patterns`, and not `without`. to: the folder; None: one in the cache.

    Raises ConfigError.
    """
    import fsspec

    try:
        fs, root = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as e:
        scheme = url.partition("://")[0]
        extra = _EXTRAS.get(scheme)
        raise ConfigError(
            f"{url} cannot be read: {e}.",
            remedy=f"Install it with: pip install 'tramontane[{extra}]'" if extra else "Use s3://, gs:// or az://.",
            param="MODEL",
        ) from e
    folder = to or cache_folder(url)
    try:
        found = {name: size for name, size in _files(fs, root).items() if not fnmatch(name, without)}
        files = {name: size for name, size in found.items() if any(fnmatch(name, p) for p in patterns)}
        if files:
            folder.mkdir(parents=True, exist_ok=True)
        for name, size in files.items():
            _download_one(fs, f"{root.rstrip('/')}/{name}", folder / name, size)
    except Exception as e:  # each bucket's library has errors of its own
        raise ConfigError(
            f"{url} could not be read: {e or type(e).__name__}.",
            remedy="Check the address and the credentials of this machine.",
            param="MODEL",
        ) from e
    if not files:
        raise ConfigError(
            f"{url} has no files of a checkpoint.",
            remedy="Give the address of the folder that holds config.json or params.json, or a .gguf file.",
            param="MODEL",
        )
    return folder


def _files(fs: Any, root: str) -> dict[str, int]:
    """Name relative to the root -> bytes, of the files directly in it and of one folder below."""
    found = fs.find(root, maxdepth=2, detail=True)
    start = len(root.rstrip("/")) + 1
    return {path[start:]: int(info["size"]) for path, info in found.items()}


def _download_one(fs: Any, path: str, target: Path, size: int) -> None:
    """Under another name until it is whole, so that a broken download is never taken for the file."""
    if target.is_file() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        fs.get_file(path, str(partial))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        download(sys.argv[1], ["*"], to=Path(sys.argv[2]), without="".join(sys.argv[3:4]))
    except ConfigError as e:
        sys.exit(f"tramontane: {e}")
