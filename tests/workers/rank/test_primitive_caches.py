"""A process that multiplies matrices of ever new shapes keeps a bounded number of compiled products."""

import subprocess
import sys

import pytest

from workers.rank.primitive_caches import NUM_PRIMITIVES, VARIABLES, bound_primitive_caches

# The C library's own count of bytes in use: what is merely free does not count.
GROWTH = """
import ctypes, os, sys
from workers.rank.primitive_caches import bound_primitive_caches
if sys.argv[1] == "bounded":
    bound_primitive_caches(os.environ)
import torch
from workers.quant.dense import linear, pack

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks in_use fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
weights = [pack(torch.nn.Parameter(torch.randn(n, 64))) for n in (64, 96, 128)]

def multiply(rows):
    for weight in weights:
        linear(torch.randn(rows, 64), weight)

with torch.inference_mode():
    torch.set_num_threads(1)
    for rows in range(1, 101):
        multiply(rows)
    before = libc.mallinfo2().in_use
    for rows in range(101, 401):
        multiply(rows)
    print(libc.mallinfo2().in_use - before)
"""


def growth(how: str) -> int:
    process = subprocess.run([sys.executable, "-c", GROWTH, how], capture_output=True, text=True, check=True)
    return int(process.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_products_are_dropped():
    bounded, free = growth("bounded"), growth("free")
    if free < 2**20:
        pytest.skip("this torch compiles no products on this CPU")
    assert bounded < free / 4


def test_the_operators_settings_stay():
    environ = {VARIABLES[0]: "7"}
    bound_primitive_caches(environ)
    assert environ == {VARIABLES[0]: "7", VARIABLES[1]: str(NUM_PRIMITIVES)}
