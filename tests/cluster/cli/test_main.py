"""The command line's bytes: names of files are UTF-8 whatever the locale says."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # Python itself knows the plain C locale


def generate(model: str | bytes, **environ: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "cluster.cli.main", "generate", model]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "environ", [{}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, ASCII], ids=["as here", "C", "POSIX", "ASCII"]
)
def test_a_path_of_non_ascii_letters_is_text(tmp_path: Path, environ: dict[str, str]) -> None:
    done = generate(str(tmp_path / "modèle-日本"), **environ)
    assert done.returncode == 2
    assert "modèle-日本 does not exist".encode() in done.stderr, done.stderr


@pytest.mark.parametrize("environ", [{}, ASCII], ids=["as here", "ASCII"])
def test_bytes_that_are_no_text_are_refused_by_their_value(environ: dict[str, str]) -> None:
    done = generate(b"/tmp/mod\xe8le", **environ)
    assert done.returncode == 2
    assert done.stderr == b"tramontane: The argument /tmp/mod\\xe8le is not valid UTF-8. Rename the file or folder.\n"


def test_a_reader_that_has_enough_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "cluster.cli.main", "plan", "mistralai/Mistral-7B-v0.3", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
