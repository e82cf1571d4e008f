"""What a Ray of our own asks of this machine: the decisions, with made-up facts, and the probes on folders of this machine."""

import errno
import socket
from pathlib import Path

import pytest

from cluster.ray_runtime import surroundings
from cluster.ray_runtime.surroundings import (
    MAX_PARENT,
    MIN_OPEN_FILES,
    Trouble,
    check_loopback,
    check_open_files,
    choose_parent,
    has_shared_memory,
    probe_folder,
    probe_loopback,
)
from workers.errors import ConfigError

LONG = "/" + "a" * 79


def parent(environ: dict[str, str], troubles: dict[str, Trouble] | None = None) -> str:
    return str(choose_parent(environ, lambda path: (troubles or {}).get(str(path))))


@pytest.mark.parametrize(
    ("environ", "missing", "expected"),
    [
        ({}, (), "/tmp"),
        ({"TMPDIR": ""}, (), "/tmp"),
        ({"TMPDIR": "/scratch"}, (), "/scratch"),
        ({"RAY_TMPDIR": "/r", "TMPDIR": "/scratch"}, (), "/r"),
        ({"RAY_TMPDIR": "/r", "TMPDIR": LONG}, (), "/r"),
        ({"TMPDIR": LONG}, (), "/tmp"),
        ({"TMPDIR": "/" + "a" * (MAX_PARENT - 1)}, (), "/" + "a" * (MAX_PARENT - 1)),
        ({"TMPDIR": "/" + "é" * (MAX_PARENT // 2 + 1)}, (), "/tmp"),
        ({"TMPDIR": "/gone"}, ("/gone",), "/tmp"),
    ],
)
def test_where_rays_files_go(environ: dict[str, str], missing: tuple[str, ...], expected: str) -> None:
    assert parent(environ, {path: Trouble(error=errno.ENOENT) for path in missing}) == expected


@pytest.mark.parametrize(
    ("environ", "where", "trouble", "message", "remedy"),
    [
        ({}, "/tmp", Trouble(error=errno.ENOSPC), "/tmp is full: it has 0.0 MiB free", "Free 32 MiB there, or set RAY_TMPDIR"),
        ({}, "/tmp", Trouble(error=errno.EDQUOT, free_bytes=2**30), "/tmp is full", "set RAY_TMPDIR"),
        ({}, "/tmp", Trouble(error=errno.EROFS), "/tmp is read-only", "Make it writable, or set RAY_TMPDIR"),
        ({"TMPDIR": "/t"}, "/t", Trouble(error=errno.ENOSPC), "TMPDIR, /t, is full", "Free 32 MiB there"),
        ({"TMPDIR": "/t"}, "/t", Trouble(error=errno.EROFS), "TMPDIR, /t, is read-only", "Make it writable"),
        ({"TMPDIR": "/t"}, "/t", Trouble(error=errno.EACCES), r"cannot be written \(Permission denied\)", "Make it writable"),
        ({"TMPDIR": "/t"}, "/t", Trouble(error=errno.ENOTDIR), r"cannot be written \(Not a directory\)", "Make it writable"),
        ({"RAY_TMPDIR": "/r"}, "/r", Trouble(error=errno.ENOENT), "RAY_TMPDIR, /r, does not exist", "Create it"),
        ({"TMPDIR": "/t"}, "/t", Trouble(error=errno.EPERM, is_socket=True), "cannot hold sockets", "on a local disk"),
        ({"TMPDIR": LONG}, "/tmp", Trouble(error=errno.EROFS), "/tmp is read-only", "set RAY_TMPDIR"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_have_them(
    environ: dict[str, str], where: str, trouble: Trouble, message: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parent(environ, {where: trouble})
    assert remedy in (raised.value.remedy or "")


def test_a_long_ray_tmpdir_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="RAY_TMPDIR is 80 bytes long") as raised:
        parent({"RAY_TMPDIR": LONG})
    assert raised.value.param == "RAY_TMPDIR"


def test_rays_longest_socket_path_fits_below_the_longest_folder() -> None:
    session = "session_2026-11-30_05-52-32_236198_4194304"
    path = "/" + "a" * (MAX_PARENT - 1) + f"/tramontane-ray-91vy5pje/{session}/sockets/dash_MetricsHead"
    assert len(path) == 107, "Linux takes paths of Unix sockets of up to 107 bytes"


def test_open_files() -> None:
    check_open_files(MIN_OPEN_FILES)
    with pytest.raises(ConfigError, match="only 64 open files") as raised:
        check_open_files(64)
    assert "ulimit -n" in (raised.value.remedy or "")


def test_loopback() -> None:
    assert probe_loopback() is None
    check_loopback(None)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 \(Network is unreachable\)"):
        check_loopback(OSError(errno.ENETUNREACH, "Network is unreachable"))


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    assert probe_folder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "error"), [("nothing", errno.ENOENT), ("file", errno.ENOTDIR)])
def test_the_probe_says_what_failed(tmp_path: Path, make: str, error: int) -> None:
    path = tmp_path / "x"
    if make == "file":
        path.write_text("")
    assert probe_folder(path) == Trouble(error=error, free_bytes=surroundings.free_bytes(path))


def test_the_probe_tries_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)  # too long for a socket, not for a file
    deep.mkdir()
    found = probe_folder(deep)
    assert found is not None and found.is_socket


def test_shared_memory_is_not_used_where_it_has_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(surroundings, "SHARED_MEMORY", tmp_path)
    assert has_shared_memory(1)
    assert not has_shared_memory(2**80)
    monkeypatch.setattr(surroundings, "SHARED_MEMORY", tmp_path / "none")
    assert not has_shared_memory(1)


def test_the_socket_module_agrees_about_the_limit(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s, pytest.raises(OSError, match="AF_UNIX path too long"):
        s.bind("/" + "a" * surroundings.MAX_SOCKET_PATH)
