"""Runs these tests: `python run.py VENV [pytest arguments]`, in the project's environment. Where it cannot, it says why, with status 0.

Makes VENV at the first call: the CUDA build of torch, which the package index has for this release (527 MB), and everything else from
the project's environment. Then builds the fake device, and starts pytest in VENV with it. No GPU and no driver are needed or used.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import build_device
from gpus import A100_80

ROOT = Path(__file__).resolve().parents[2]
# Elsewhere, and with some settings of pip, the same release of torch is a build for the CPU.
INDEX = os.environ.get("TRAMONTANE_CUDA_INDEX", "https://pypi.org/simple")
NOT_FOR_THIS = (
    "PIP_CONFIG_FILE",
    "PIP_CONSTRAINT",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
    "PIP_INDEX_URL",
    "PIP_NO_INDEX",
)


class CannotRunError(Exception):
    """These tests cannot run here. The message says why, for the person who asked for them."""


def main(venv: Path, arguments: list[str]) -> None:
    try:
        python = prepare(venv)
        libraries = build(venv, python)
    except CannotRunError as e:
        print(f"The tests on the fake CUDA device are left out: {e}")
        return
    os.chdir(ROOT)
    environment = (
        os.environ
        | A100_80.environment()
        | {
            # tests/conftest.py turns the interpreter on where nothing is said.
            "TRITON_INTERPRET": "0",
            "LD_LIBRARY_PATH": str(libraries),
            "TRITON_CACHE_DIR": str(venv / "triton-cache"),
            # A few small tensors: threads would only wait for each other.
            "OMP_NUM_THREADS": "1",
        }
    )
    command = [str(python), "-m", "pytest", "-m", "cuda_host", "tests/cuda_host", *arguments]
    os.execve(python, command, environment)


def prepare(venv: Path) -> Path:
    """Its Python. The environment is complete once its file of paths exists."""
    if not (shutil.which("g++") and shutil.which("gcc") and shutil.which("nm") and shutil.which("readelf")):
        raise CannotRunError("they need a C++ compiler. On Debian and Ubuntu, install it with: apt install g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise CannotRunError(
            "they need Python's headers. On Debian and Ubuntu, install them with: apt install python3-dev"
        )
    python = venv / "bin" / "python"
    packages = venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    paths = packages / "project.pth"
    release = version("torch").split("+")[0]
    if paths.exists() and (packages / f"torch-{release}.dist-info").exists():
        return python
    print(
        f"Installing the CUDA build of torch {release} into {venv}; the first time takes a minute or more.", flush=True
    )
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    install(f"torch=={release}", packages)
    # A path file's line that starts with "import" is run. The packages of the project's environment come after torch.
    paths.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


def install(requirement: str, packages: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_THIS}
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--index-url", INDEX, "--target", str(packages)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, requirement],
        env=environment | {"PIP_CONFIG_FILE": os.devnull},
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
        raise CannotRunError(f"{requirement} could not be installed from {INDEX} ({reason}).")
    if "cuda: Optional[str] = None" in (packages / "torch" / "version.py").read_text():
        raise CannotRunError(f"{INDEX} has {requirement} without CUDA for this machine.")


def build(venv: Path, python: Path) -> Path:
    """The folder of the fake device's libraries, built again after a change of its sources."""
    digest = hashlib.sha256()
    for source in (Path(build_device.__file__), *sorted(build_device.SOURCES.iterdir())):
        digest.update(source.read_bytes())
    folder = venv / "fake-cuda" / digest.hexdigest()[:16]
    if not (folder / build_device.LIBRARY).exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        done = subprocess.run([str(python), build_device.__file__, str(folder)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            shutil.rmtree(folder)
            raise RuntimeError(f"The fake device does not compile:\n{done.stderr}")
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
