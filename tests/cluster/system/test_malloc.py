"""Large blocks go back to the system when they are freed, whatever thread used them; the operator's own settings win."""

import subprocess
import sys

import pytest

# Sizes grow, so that glibc would raise its threshold and keep each block; small blocks after them keep the heaps from being trimmed.
FREED = """
import re, sys, threading
from pathlib import Path
from cluster.system.malloc import return_large_blocks

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def work(kept):
    for size in range(1, 17):
        block = b"x" * (size << 20)
        kept.append(bytearray(2000))
        del block

print(return_large_blocks())
kept = []
before = resident()
for _ in range(2):
    threads = [threading.Thread(target=work, args=(kept,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(resident() - before)
"""


def run(code: str, **env: str) -> list[str]:
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return process.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_large_blocks_are_returned():
    was_set, kept = run(FREED)
    assert was_set == "True"
    assert int(kept) < 16 * 2**20


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_own_settings_win(name):
    code = "from cluster.system.malloc import return_large_blocks; print(return_large_blocks())"
    assert run(code, **{name: ""}) == ["False"]
