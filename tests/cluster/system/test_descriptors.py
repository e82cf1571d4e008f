"""The limit on open files is raised as far as allowed, and never lowered. In processes of their own."""

import subprocess
import sys

import pytest
from support.paths import ROOT

SCRIPT = """
import resource, sys
from cluster.system.descriptors import raise_limit
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(raise_limit(wanted), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "limit"),
    [(64, 64, 1000, 64), (64, 500, 1000, 500), (64, 500, 200, 200), (300, 500, 200, 300)],
)
def test_the_limit_is_raised_as_far_as_allowed(soft: int, hard: int, wanted: int, limit: int) -> None:
    command = [sys.executable, "-c", SCRIPT, *map(str, (soft, hard, wanted))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert list(map(int, done.stdout.split())) == [limit, limit, hard]
