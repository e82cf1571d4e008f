"""What this machine must offer before a Ray of our own starts: open files, its own loopback address, a folder, shared memory.

The decisions are pure functions of what was found; the probes below them try the real thing, such as a socket in the folder. Every
refusal is one ConfigError that names the cause and the remedy. Knows nothing of Ray but what it needs.
"""

import errno
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.system.descriptors import raise_limit
from workers.errors import ConfigError

log = logging.getLogger(__name__)

WANTED_OPEN_FILES = 65_536
MIN_OPEN_FILES = 256  # the raylet ends while it starts with 64; 256 serve
FOLDER_BYTES = 32 * 2**20  # Ray writes 2 MiB while it starts, mostly logs, and more later
FOLDER_FILES = 500  # Ray makes about 100 while it starts
PARENT = "/tmp"
SHARED_MEMORY = Path("/dev/shm")
LOOPBACK = "127.0.0.1"
LOOPBACK_TIMEOUT_S = 2.0
MAX_SOCKET_PATH = 107  # bytes of the path of a Unix socket, on Linux
# The longest one that Ray makes below the folder's parent: the folder, the session, the socket.
_LONGEST_PATH = "/tramontane-ray-12345678/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_MetricsHead"
MAX_PARENT = MAX_SOCKET_PATH - len(_LONGEST_PATH)


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why a folder cannot have Ray's files: the errno of the first thing that failed there."""

    error: int
    is_socket: bool = False  # a socket could not be made, though a file could
    free_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """parent: where the folder of a Ray of our own is made. object_store: where Ray's shared memory is; None for that folder itself."""

    parent: Path
    object_store: Path | None


def check_surroundings(*, object_store_bytes: int) -> Surroundings:
    """Raises the limit on open files, and says where Ray's files go. Raises ConfigError, within seconds."""
    check_open_files(raise_limit(WANTED_OPEN_FILES))
    check_loopback(probe_loopback())
    parent = choose_parent(os.environ, probe_folder)
    if len(os.fsencode(os.environ.get("TMPDIR", ""))) > MAX_PARENT:
        # Ray's dashboard makes sockets there too.
        os.environ["TMPDIR"] = str(parent)
    has_room = has_shared_memory(object_store_bytes)
    if not has_room:
        log.info(
            "%s has no room for %d bytes: Ray's shared memory goes to its folder.", SHARED_MEMORY, object_store_bytes
        )
    return Surroundings(parent=parent, object_store=SHARED_MEMORY if has_room else None)


def check_open_files(limit: int) -> None:
    """limit: how many files one process may have open. Raises ConfigError."""
    if limit < MIN_OPEN_FILES:
        raise ConfigError(
            f"A process may have only {limit} open files here, and Ray needs at least {MIN_OPEN_FILES}.",
            remedy="Raise the limit with `ulimit -n 65536`, or with LimitNOFILE= or --ulimit nofile=65536 where a service manager sets it.",
        )


def check_loopback(error: OSError | None) -> None:
    """error: of a connection from this machine to itself. Raises ConfigError."""
    if error is not None:
        raise ConfigError(
            f"This machine cannot connect to its own address {LOOPBACK} ({error.strerror or error}).",
            remedy="Bring the loopback interface up with `ip link set lo up`, and allow connections over it.",
        )


def ray_parent(environ: Mapping[str, str]) -> tuple[str, str | None]:
    """The folder in which Ray's files are wanted, and the variable that says so, if any does."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if path := environ.get(variable):
            return str(Path(path).absolute()), variable
    return PARENT, None


def choose_parent(environ: Mapping[str, str], probe: Callable[[Path], Trouble | None]) -> Path:
    """RAY_TMPDIR, else TMPDIR, else /tmp. A TMPDIR that no program can use so, too long or missing, is passed over. Raises ConfigError."""
    path, variable = ray_parent(environ)
    length = len(os.fsencode(path))
    trouble = None if length > MAX_PARENT else probe(Path(path))
    if variable == "TMPDIR" and (length > MAX_PARENT or (trouble is not None and trouble.error == errno.ENOENT)):
        why = f"longer than {MAX_PARENT} bytes" if length > MAX_PARENT else "missing"
        log.info("TMPDIR, %s, is %s: Ray's files go to %s.", path, why, PARENT)
        path, variable, length, trouble = PARENT, None, len(PARENT), probe(Path(PARENT))
    if length > MAX_PARENT:
        raise ConfigError(
            f"{variable} is {length} bytes long, which is too long for the paths of Ray's sockets: {path}.",
            remedy=f"Set {variable} to a folder of at most {MAX_PARENT} bytes.",
            param=variable,
        )
    if trouble is not None:
        raise _unusable(path, variable, trouble)
    return Path(path)


def _unusable(path: str, variable: str | None, trouble: Trouble) -> ConfigError:
    where = path if variable is None else f"{variable}, {path},"
    elsewhere = "set RAY_TMPDIR to another folder"
    match trouble.error:
        case _ if trouble.is_socket:
            what, remedy = f"cannot hold sockets ({os.strerror(trouble.error)})", f"{elsewhere} on a local disk"
        case errno.ENOSPC | errno.EDQUOT:
            has = f"{trouble.free_bytes / 2**20:.1f} MiB free, or no room for more files"
            what, remedy = f"is full: it has {has}", f"free {FOLDER_BYTES // 2**20} MiB there, or {elsewhere}"
        case errno.EROFS:
            what, remedy = "is read-only", f"make it writable, or {elsewhere}"
        case errno.ENOENT:
            what, remedy = "does not exist", f"create it, or {elsewhere}"
        case error:
            what, remedy = f"cannot be written ({os.strerror(error)})", f"make it writable, or {elsewhere}"
    return ConfigError(
        f"Ray cannot put its files where they belong: {where} {what}.",
        remedy=f"{remedy[0].upper()}{remedy[1:]}.",
        param=variable,
    )


def probe_folder(path: Path) -> Trouble | None:
    """Makes a folder, a file of FOLDER_BYTES and a socket in `path`, and removes them."""
    is_socket = False
    try:
        facts = os.statvfs(path)
        if facts.f_files and facts.f_favail < FOLDER_FILES:  # some file systems count no files
            raise OSError(errno.ENOSPC, "no room for more files")
        with tempfile.TemporaryDirectory(prefix="tr-", dir=path, ignore_cleanup_errors=True) as name:
            with (Path(name) / "f").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, FOLDER_BYTES)
            is_socket = True
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(f"{name}/s")
    except OSError as e:
        return Trouble(error=e.errno or errno.EIO, is_socket=is_socket, free_bytes=free_bytes(path))
    return None


def probe_loopback() -> OSError | None:
    """What a connection from this machine to itself ended in."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_TIMEOUT_S).close()
    except OSError as e:
        return e
    return None


def has_shared_memory(num_bytes: int) -> bool:
    return os.access(SHARED_MEMORY, os.W_OK | os.X_OK) and free_bytes(SHARED_MEMORY) >= num_bytes


def free_bytes(path: Path) -> int:
    """0 where it cannot be said."""
    try:
        facts = os.statvfs(path)
    except OSError:
        return 0
    return facts.f_bavail * facts.f_frsize
