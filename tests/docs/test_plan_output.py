"""What docs/deploy/README.md shows of `tramontane plan` is what the command prints, apart from line breaks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import fences
from support.paths import ROOT

PAGE = ROOT / "docs" / "deploy" / "README.md"
COMMAND = Path(sys.executable).parent / "tramontane"
# The page's commands -> the beginning of what it shows of them.
SHOWN = {
    "--gpu A10G --context 8192 --concurrency 32": "mistralai/Mistral-7B-Instruct-v0.3: 7.25 billion",
    "--gpu A10G:1 --concurrency 400": "tramontane: mistralai/Mistral-7B-Instruct-v0.3 does not fit",
}


@pytest.mark.parametrize("options", SHOWN)
def test_the_page_shows_what_the_command_prints(options: str, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    command = f"plan mistralai/Mistral-7B-Instruct-v0.3 {options}"
    assert f"tramontane {command}" in text
    (shown,) = [fence.text for fence in fences(text) if fence.text.startswith(SHOWN[options])]
    # A home without SkyPilot's catalog: prices come from the built-in table.
    env = {**os.environ, "HOME": str(tmp_path), "COLUMNS": "160"}
    done = subprocess.run([COMMAND, *command.split()], capture_output=True, text=True, timeout=60, env=env, check=False)
    assert shown.split() in (done.stdout.split(), done.stderr.split()), done.stdout + done.stderr
