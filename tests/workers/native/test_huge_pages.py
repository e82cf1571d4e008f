"""Large pages for large tensors: asked for where the system has them, and never a change of what a tensor holds."""

import re
import sys
from pathlib import Path

import pytest
import torch

from workers.native.huge_pages import MIN_BYTES, prefer_huge_pages

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> str:
    """The kernel's flags of the mapping that holds an address: "hg" is what was asked for."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    raise AssertionError("no mapping holds the address")


@pytest.mark.skipif(
    sys.platform != "linux" or not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no transparent huge pages",
)
def test_a_large_tensor_gets_them():
    large = torch.empty(16 * MIN_BYTES, dtype=torch.uint8)
    prefer_huge_pages(large)
    assert " hg" in flags_at(large.data_ptr() + large.nbytes // 2)
    large.fill_(7)
    assert large.min() == large.max() == 7


def test_tensors_without_memory_are_left_alone():
    prefer_huge_pages(torch.empty(0))
    prefer_huge_pages(torch.empty(MIN_BYTES, dtype=torch.uint8, device="meta"))
