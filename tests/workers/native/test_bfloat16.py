"""Which machines compute bfloat16 on the CPU: instructions and kernels that use them."""

from types import SimpleNamespace
from typing import Any

import pytest

from workers.device.cpu import CpuFacts
from workers.native.bfloat16 import bfloat16_support, judge_support
from workers.native.library import NativeLibrary, NoNativeLibrary

NEW_CPU, OLD_CPU = CpuFacts(num_cores=2, bfloat16_flag="avx512_bf16"), CpuFacts(num_cores=2)
NO_KERNELS = NoNativeLibrary(reason="They are not built. Build them.")


def kernels(variant: str) -> NativeLibrary:
    symbols: Any = SimpleNamespace()
    return NativeLibrary(variant=variant, build_id="0" * 16, openmp="libgomp.so.1", _symbols=symbols)


@pytest.mark.parametrize(
    ("cpu", "library", "obstacle"),
    [
        (NEW_CPU, kernels("avx512"), None),
        (NEW_CPU, kernels("avx2"), "uses the kernels for avx2, which has no instructions for bfloat16."),
        (NEW_CPU, NO_KERNELS, "has no compiled kernels for bfloat16. They are not built. Build them."),
        (OLD_CPU, kernels("avx2"), "has no instructions for bfloat16."),
    ],
)
def test_both_the_instructions_and_the_kernels_are_needed(cpu, library, obstacle):
    found = judge_support(cpu, library)
    assert found.obstacle == obstacle
    assert found.instructions == (None if obstacle else "avx512_bf16")


def test_this_machine_has_an_answer():
    found = bfloat16_support()
    assert (found.instructions is None) != (found.obstacle is None)
