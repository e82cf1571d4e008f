"""What the nodes of tests/cloud install without a network: a wheelhouse prepared in advance, and the programs that the machine needs.

Knows pip, apt and where interpreters lie. The wheelhouse is `build/cloud/wheels` and is kept between runs; `make clean` removes it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from support.paths import ROOT

CHECKOUT = ROOT
WHEELS = CHECKOUT / "build" / "cloud" / "wheels"
PROGRAMS = {  # and the Debian package of each
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
    "socat": "socat",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "curl": "curl",
    "openssl": "openssl",
}
SKYPILOT_PYTHON = "3.10"  # SkyPilot creates its own environment on a node with exactly this version


class Missing(Exception):
    """Something missing on this machine, and how to install it."""


def require_programs() -> None:
    """Installs what is missing, if it can: as root, with apt."""
    if os.geteuid() != 0:
        raise Missing("The nodes are network and mount namespaces: run it as root.")
    if missing := _missing_packages():
        if shutil.which("apt-get") is None:
            raise Missing(f"Install what Debian calls {' '.join(missing)}.")
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], env=env, stdout=subprocess.DEVNULL, check=False)
        if missing := _missing_packages():
            raise Missing(f"apt-get could not install {' '.join(missing)}.")


def skypilot_python() -> Path:
    """The folder of a Python with the version that SkyPilot needs on its nodes."""
    name = f"python{SKYPILOT_PYTHON}"
    on_path = [Path(found)] if (found := shutil.which(name)) else []
    managed = [
        *Path.home().glob(f".pyenv/versions/{SKYPILOT_PYTHON}*/bin/{name}"),
        *Path.home().glob(f".local/share/uv/python/*-{SKYPILOT_PYTHON}.*/bin/{name}"),
    ]
    for program in [*managed, *on_path]:
        asked = subprocess.run(
            [program, "-c", "import sys; print(sys.base_prefix)"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            return Path(asked.stdout.strip())
    raise Missing(
        f"SkyPilot makes its environment on a node with Python {SKYPILOT_PYTHON}, which was not found: "
        f"`uv python install {SKYPILOT_PYTHON}` or `pyenv install {SKYPILOT_PYTHON}` brings it."
    )


def fill_wheelhouse(python310: Path) -> Path:
    """Downloads all that SkyPilot's runtime and Tramontane's setup install; returns the folder. The first run needs the registries."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    ours = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["s3"]]
    build = [*project["build-system"]["requires"], "editables", "setuptools", "wheel", "pip", "uv"]
    runtime = [f"skypilot[slurm,remote]=={version('skypilot')}", "click<8.3.0", "setuptools<70", "wheel", "pip"]
    constraints = CHECKOUT / "constraints.txt"
    key = hashlib.sha256(repr((ours, build, runtime, constraints.read_text())).encode()).hexdigest()
    complete = WHEELS / "complete"
    if not complete.exists() or complete.read_text() != key:
        python = python310 / "bin" / f"python{SKYPILOT_PYTHON}"
        _pip_wheel(["--python", str(python)], runtime)
        _pip_wheel([], [*ours, *build, "-c", str(constraints)])
        complete.write_text(key)
    return WHEELS


def unpack_uv(wheels: Path) -> Path:
    """The uv binary from its wheel."""
    wheel = max(wheels.glob("uv-*.whl"), key=lambda path: path.stat().st_mtime)
    folder = WHEELS.parent / "uv"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", f"--target={folder}", wheel],
        check=True,
    )
    return folder / "bin" / "uv"


def _pip_wheel(interpreter: list[str], requirements: list[str]) -> None:
    command = [sys.executable, "-m", "pip", *interpreter, "wheel", "--quiet", f"--wheel-dir={WHEELS}"]
    command += [f"--find-links={WHEELS}", *requirements]  # existing files are not downloaded again
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise Missing(f"The nodes' packages could not be fetched: {done.stderr.strip()[-1000:]}")


def _missing_packages() -> list[str]:
    places = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program, path=places) is None})
