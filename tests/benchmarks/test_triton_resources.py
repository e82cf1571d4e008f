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
    for num_rows in (8, 64):
        resources.launch_product(num_rows, 4096, num_bits=4)

found = []
for kernel in compile_for(80, launch):
    layouts = re.findall(r"nvidia_mma<{versionMajor = (\\d+), .*?instrShape = \\[(.*?)\\]}>", kernel.ttgir)
    found.append({
        "name": kernel.name,
        "rows": kernel.constants.get("BLOCK_M") or kernel.constants["ROWS"],
        "is_split": kernel.constants.get("IS_SPLIT"),
        "num_spilled_bytes": kernel.num_spilled_bytes,
        "num_programs": resources.programs_at_once(kernel, 80),
        "instructions": sorted(set(layouts)),
        "operand_widths": sorted(set(re.findall(r"kWidth = (\\d+)", kernel.ttgir))),
        "copies": re.findall(r"async_copy_global_to_local .*?contiguity = (\\d+).*?ptr<(\\w+)>", kernel.ttgir),
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
    assert {kernel["name"] for kernel in decode} == {"attention_kernel", "merge_kernel", "grouped_kernel"}
    assert not any(kernel["num_spilled_bytes"] for kernel in decode), "see benchmarks/results/triton_resources.md"
    assert all(kernel["num_programs"] >= 3 for kernel in decode), "too few programs to hide the memory's latency"


def test_decode_and_prefill_multiply_with_the_same_instruction(kernels):
    """A query has the same bits in both only if each sum is a chain of the same instructions over the same operands."""
    small, large = (
        next(k for k in kernels if k["name"] == "attention_kernel" and k["rows"] == rows) for rows in (16, 64)
    )
    assert small["instructions"] == large["instructions"] == [["2", "16, 8"]]
    assert small["operand_widths"] == large["operand_widths"] == ["2"]


def test_the_int4_product_copies_weights_in_vectors_of_16_bytes_and_any_rows_with_the_same_instruction(kernels):
    grouped = [kernel for kernel in kernels if kernel["name"] == "grouped_kernel"]
    assert [kernel["rows"] for kernel in grouped] == [16, 32]
    for kernel in grouped:
        assert kernel["instructions"] == [["2", "16, 8"]] and kernel["num_spilled_bytes"] == 0
        of_words = {int(contiguity) for contiguity, dtype in kernel["copies"] if dtype == "i16"}
        assert of_words == {8}, "eight words of 16 bits"
