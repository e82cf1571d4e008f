"""Tests that `make test` leaves out run in another target of the Makefile, which asks for their marker and has their file."""

import re
from itertools import pairwise

import pytest
from support.paths import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
LEFT_OUT = re.findall(r"not (\w+)", re.search(r"-m '(not .*?)'", PYPROJECT)[1])
# Its target runs a script, which runs pytest in another environment.
LEFT_OUT.remove("cuda_host")


def runs(words: list[str], file: str) -> bool:
    """Whether a pytest command with these words collects the file."""
    ignored = [after for word, after in pairwise(words) if word == "--ignore"]
    paths = [word for word in words if word.startswith("tests/") and word not in ignored]
    return file.startswith(tuple(paths)) and not file.startswith(tuple(ignored))


@pytest.mark.parametrize("marker", LEFT_OUT)
def test_every_file_with_a_marker_runs_in_a_target(marker: str) -> None:
    commands = [line.split() for line in re.findall(rf"-m pytest .*-m {marker}( .*)", MAKEFILE)]
    files = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(rf"\bmark\.{marker}\b", path.read_text(encoding="utf-8"))
    ]
    assert files, f"the marker {marker} is not used"
    left_out = [file for file in files if not any(runs(words, file) for words in commands)]
    assert not left_out, f"no target of the Makefile runs their tests with the marker {marker}"


def test_what_a_command_runs() -> None:
    words = ["tests/system", "tests/cluster", "--ignore", "tests/system/batches"]
    assert runs(words, "tests/cluster/router/test_x.py") and runs(words, "tests/system/test_x.py")
    assert not runs(words, "tests/system/batches/test_x.py") and not runs(words, "tests/workers/test_x.py")
