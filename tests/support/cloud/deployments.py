"""Shared by the tests of deploy/: the release, pins, the linters, and the `tramontane serve` inside a shell script.

The linters are other people's and large; `make lint-deploy` installs them beside the project. Where one is missing its test is left out.
"""

import re
import shlex
import shutil
import tomllib
from argparse import Namespace
from collections.abc import Mapping

import pytest

from cluster.cli.options.parser import make_parser
from support.paths import ROOT

DEPLOY = ROOT / "deploy"
LINTERS = ROOT / ".venv-linters" / "bin"
NODE_MODULES = LINTERS.parent / "node_modules"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    re.sub(r"[-_.]+", "-", name).lower(): release
    for name, release in re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")  # an image with a release for a tag


def linter(name: str) -> str:
    """The path of the command. Without it the test is skipped."""
    found = shutil.which(name, path=str(LINTERS)) or (None if name == "python" else shutil.which(name))
    if found is None:
        pytest.skip(f"{name} is not installed; `make lint-deploy` does that, as far as it can be")
    return found


def serve_arguments(script: str, variables: Mapping[str, str]) -> Namespace:
    """The options of `tramontane serve ...` in a script, from our own parser, which fails the test for an unknown option."""
    command = re.search(r"tramontane serve ((?:[^\n\\]|\\\n)*)", script)
    assert command is not None, f"nothing is served by:\n{script}"
    filled = re.sub(r"\$\{?(\w+)(?::\+[^}]*)?\}?", lambda match: variables[match[1]], command[1].replace("\\\n", " "))
    return make_parser().parse_args(["serve", *shlex.split(filled)])
