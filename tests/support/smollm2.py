"""The real model that `make smollm2` downloads, for tests that use it where it is in the cache."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("SMOLLM2") or Path.home() / ".cache" / "tramontane" / "smollm2")
FILE = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is not there; `make smollm2` downloads it")
