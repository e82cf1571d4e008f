"""Kernels that were compiled without a GPU, as the Docker image does it, are what an engine on a GPU looks for."""

import subprocess
import sys

import pytest
from cuda_host.gpus import A10G
from cuda_host.processes import environment, run_program

pytestmark = pytest.mark.cuda_host
LAUNCHER = "cuda_utils"


@pytest.mark.timeout(300)
def test_a_7b_engine_compiles_nothing_but_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def entries() -> tuple[set[str], int]:
        return {path.name.split(".")[0] for path in tmp_path.glob("*/*")} - {LAUNCHER}, len(
            list(tmp_path.glob("*/*.cubin"))
        )

    command = [sys.executable, "-m", "workers.engine.kernel_cache", "--capabilities", str(A10G.capability)]
    subprocess.run([*command, "--tensor-parallel-sizes", "1"], env=environment(A10G), check=True, timeout=200)
    compiled = entries()
    assert "attention_kernel" in compiled[0] and compiled[1] > 10
    run_program("kv_cache_size", A10G)
    assert entries() == compiled
