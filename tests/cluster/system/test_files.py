"""Replacing a file: all of the old one or all of the new one, whatever happens to the writer."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.system.files import move_into_place, replace_file, version_of


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_bytes(b"old")
    return path


def test_bytes_or_a_writer_replace_the_file(path):
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    replace_file(path, lambda file: [file.write(b"%d," % i) for i in range(3)])
    assert path.read_bytes() == b"0,1,2,"
    assert [p.name for p in path.parent.iterdir()] == ["data.json"], "no temporary file is left"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_file(path, error):
    def write(file) -> None:
        file.write(b"half of the n")
        file.flush()
        raise error

    before = version_of(path)
    with pytest.raises(error):
        replace_file(path, write)
    assert (path.read_bytes(), version_of(path)) == (b"old", before)
    assert [p.name for p in path.parent.iterdir()] == ["data.json"], "no temporary file is left"


KILLED = """
import os, signal, sys
from pathlib import Path
from cluster.system.files import replace_file

def write(file):
    file.write(b"half of the n")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

replace_file(Path(sys.argv[1]), write)
"""


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_removes_what_it_left(path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["data.json"]


def test_permissions_are_kept_unless_given(path, tmp_path):
    path.chmod(0o640)
    replace_file(path, b"new")
    assert mode_of(path) == 0o640
    replace_file(path, b"new", mode=0o600)
    assert mode_of(path) == 0o600
    replace_file(tmp_path / "secret", b"", mode=0o600)
    assert mode_of(tmp_path / "secret") == 0o600
    (tmp_path / "usual").touch()
    replace_file(tmp_path / "made", b"")
    assert mode_of(tmp_path / "made") == mode_of(tmp_path / "usual")


def test_a_secret_is_never_readable_by_others_while_it_is_written(tmp_path):
    seen = []

    def write(file) -> None:
        seen.append(mode_of(tmp_path / "secret.tmp"))

    replace_file(tmp_path / "secret", write, mode=0o600)
    assert seen == [0o600]


def test_a_link_planted_at_the_temporary_name_is_not_followed(path, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "data.json.tmp").symlink_to(victim)
    replace_file(path, b"new")
    assert (victim.read_bytes(), path.read_bytes()) == (b"mine", b"new")


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "none" / "file", b"new")


def test_a_complete_file_is_moved_into_place(path):
    temporary = path.with_name("part")
    temporary.write_bytes(b"new")
    move_into_place(temporary, path)
    assert path.read_bytes() == b"new"
    assert not temporary.exists()


def test_a_version_changes_with_the_file(path):
    before = version_of(path)
    assert version_of(path) == before
    replace_file(path, b"old")
    assert version_of(path) != before, "another file, although of the same size"
    path.unlink()
    assert version_of(path) is None
