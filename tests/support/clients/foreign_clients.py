"""Runs clients in their own environment (.venv-clients, see the Makefile).

Passes the server's address, the key, and settings that keep them off the network. Knows no specific client.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.paths import DEMO_MODEL, ROOT
from support.servers.system_server import API_KEY, Server

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def run(
    arguments: Sequence[str | Path],
    *,
    server: Server,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float,
    may_fail: bool = False,
) -> str:
    """The output of a command of that environment's interpreter. If the command fails, the test fails with its output.

    may_fail: tests that failed are not a failure of pytest, which tells about them elsewhere.
    """
    assert PYTHON.exists(), "The clients' environment is missing; `make .venv-clients/.installed` makes it."
    told = {"TRAMONTANE_URL": server.url, "TRAMONTANE_API_KEY": API_KEY, "OPENAI_API_KEY": API_KEY}
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TMPDIR")}
    done = subprocess.run(
        [str(PYTHON), *map(str, arguments)],
        cwd=cwd,
        env={**kept, "HOME": str(cwd), **OFFLINE, **told, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode in ((0, 1) if may_fail else (0,)), done.stdout[-20_000:]
    return done.stdout


def write_tokenizer(folder: Path) -> Path:
    """The demo model's tokenizer under the file name that transformers expects."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DEMO_MODEL / "tokenizer.model.v3", folder / "tokenizer.model")
    shutil.copy(DEMO_MODEL / "config.json", folder)
    return folder
