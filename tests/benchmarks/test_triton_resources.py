"""Kernels compile for a GPU that is not there, as the engine launches them. In a process of its own: the tests' interprets Triton."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from support.paths import ROOT

SCRIPT = """
import json, re
import triton_resources as resources
from workers.kernels.offline import compile_for

def launch():
    resources.launch_attention([1] * 64, seq_len=4096)
    resources.launch_attention([512], seq_len=512)

found = []
for kernel in compile_for(80, launch):
    layouts = re.findall(r"nvidia_mma<{versionMajor = (\\d+), .*?instrShape = \\[(.*?)\\]}>", kernel.ttgir)
    found.append({
        "name": kernel.name,
        "rows": kernel.constants["BLOCK_M"],
        "is_split": kernel.constants.get("IS_SPLIT"),
        "num_spilled_bytes": kernel.num_spilled_bytes,
        "num_programs": resources.programs_at_once(kernel, 80),
        "instructions": sorted(set(layouts)),
        "operand_widths": sorted(set(re.findall(r"kWidth = (\\d+)", kernel.ttgir))),
    })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    env = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
    }
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_decode_launches_fits_in_the_registers(kernels):
    decode = [kernel for kernel in kernels if kernel["rows"] == 16]
    assert {kernel["name"] for kernel in decode} == {"attention_kernel", "merge_kernel"}
    assert [kernel["num_spilled_bytes"] for kernel in decode] == [0, 0], "see benchmarks/results/triton_resources.md"
    assert all(kernel["num_programs"] >= 3 for kernel in decode), "too few programs to hide the memory's latency"


def test_decode_and_prefill_multiply_with_the_same_instruction(kernels):
    """A query has the same bits in both only if each sum is a chain of the same instructions over the same operands."""
    small, large = (
        next(k for k in kernels if k["name"] == "attention_kernel" and k["rows"] == rows) for rows in (16, 64)
    )
    assert small["instructions"] == large["instructions"] == [["2", "16, 8"]]
    assert small["operand_widths"] == large["operand_widths"] == ["2"]
