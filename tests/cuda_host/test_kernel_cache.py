"""Kernels that were compiled without a GPU, as the Docker image does it, are what an engine on a GPU looks for."""

import os
import subprocess
import sys

import pytest
from cuda_host.gpus import A10G
from cuda_host.processes import environment, run_program

pytestmark = pytest.mark.cuda_host


@pytest.mark.timeout(300)
def test_a_7b_engine_compiles_nothing_but_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-m", "workers.engine.kernel_cache", "--capabilities", str(A10G.capability)]
    subprocess.run([*command, "--tensor-parallel-sizes", "1"], env=environment(A10G), check=True, timeout=200)
    compiled = set(os.listdir(tmp_path))
    assert len(compiled) > 10
    run_program("kv_cache_size", A10G)
    added = [os.listdir(tmp_path / name) for name in set(os.listdir(tmp_path)) - compiled]
    assert [[name.split(".")[0] for name in names] for names in added] == [["cuda_utils"]], added
