"""The next command ends what a killed one left of its Ray; what a living command needs is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray_runtime.folder import MARK, make_folder, marked_processes, sweep

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
OWNER = """
import sys
from pathlib import Path
from cluster.ray_runtime.folder import make_folder
folder = make_folder(Path(sys.argv[1]))
print(folder.path, flush=True)
input()
"""


def run(code: str, *args: str, **env: str) -> tuple[subprocess.Popen, str]:
    """A process, and what it says first."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def sleeper(folder: object) -> subprocess.Popen:
    return run("print('up', flush=True); input()", **{MARK: str(folder)})[0]


@pytest.fixture
def place(tmp_path):
    return tmp_path


def test_only_processes_with_this_folders_mark_are_found(place):
    mine, other = sleeper(place), sleeper(f"{place}-other")
    try:
        assert marked_processes(place) == [mine.pid]
    finally:
        for process in (mine, other):
            process.communicate("\n", timeout=10)


def test_the_folder_of_a_killed_command_is_swept_and_that_of_a_living_one_is_not(place):
    (place / "tramontane-ray-note").write_text("no folder")
    owner, path = run(OWNER, str(place))
    child = sleeper(path)
    try:
        sweep(place)
        assert Path(path).is_dir(), "its owner lives"
        assert child.poll() is None
        owner.kill()
        owner.wait()
        sweep(place)
        assert not Path(path).exists()
        assert child.wait(10) == -9
    finally:
        for process in (owner, child):
            process.kill()
            process.communicate()
    assert [p.name for p in place.iterdir()] == ["tramontane-ray-note"]


def test_its_owner_ends_it(place):
    folder = make_folder(place)
    child = sleeper(folder.path)
    folder.end()
    folder.end()
    assert child.wait(10) == -9
    child.communicate()
    assert list(place.iterdir()) == []
