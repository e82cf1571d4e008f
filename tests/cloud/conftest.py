"""One cloud for all tests of this folder: SkyPilot on a laptop, Slurm in network namespaces, no other network.

`make test-cloud` runs them: as root on Linux, with Debian's Slurm (installed when missing), Python 3.10 for SkyPilot's own runtime, and,
the first time, registries from which the nodes' wheelhouse is filled. What a node is made of lies in `slurm/`:

    laptop.sh, laptop/    the machine with the `sky` command: a bridge, SkyPilot's configuration and catalogs, "the internet"
    node.sh, etc/, bin/   a controller (c0) and two nodes (n1, n2) with Slurm and an A10G that is /dev/zero

Slurm opens no ports and has no spot nodes; but for that, and two CPUs, what is launched is what lies in `sky/`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cloud.packages import fill_wheelhouse, require_programs, skypilot_python, unpack_uv
from support.cloud.sky_client import Sky
from support.cloud.slurm_cloud import SlurmCloud


@pytest.fixture(scope="session")
def cloud() -> Iterator[SlurmCloud]:
    require_programs()
    python310 = skypilot_python()
    wheels = fill_wheelhouse(python310)
    cloud = SlurmCloud(wheels=wheels, uv=unpack_uv(wheels), pythons=[python310, Path(sys.base_prefix)])
    yield cloud
    cloud.close()


@pytest.fixture(scope="session")
def sky(cloud: SlurmCloud) -> Sky:
    return Sky(cloud)


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, str]]:
    """The measurements, printed at the end."""
    figures: dict[str, str] = {}
    yield figures
    print("\n" + "\n".join(f"{what}: {figure}" for what, figure in figures.items()))
