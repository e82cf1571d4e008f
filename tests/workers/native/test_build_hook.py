"""What `pip install .` and a wheel's build lead to, with a compiler and without: a small project with the real hook and one source."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

from workers.native.build import BuildError, find_compiler
from workers.native.variants import VARIANTS

pytest.importorskip("hatchling", reason="hatchling is a dev dependency: pip install -e '.[dev]'")
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
PYPROJECT = f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "small"
version = "1.0"
[tool.hatch.build.targets.wheel]
packages = ["workers"]
[tool.hatch.build.targets.wheel.hooks.custom]
path = "{BUILD["targets"]["wheel"]["hooks"]["custom"]["path"]}"
"""
LIBRARIES = {f"workers/native/{variant.library_path().name}" for variant in VARIANTS}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    native = tmp_path / "workers" / "native"
    native.mkdir(parents=True)
    shutil.copy(ROOT / "workers" / "__init__.py", native.parent)
    (native / "cpp").mkdir()
    for name in ("__init__.py", "build.py", "build_hook.py", "variants.py", "cpp/build_mark.cpp", "cpp/simd.h"):
        shutil.copy(ROOT / "workers" / "native" / name, native / name)
    return tmp_path


def build(project: Path, *targets: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hatchling", "build", *(word for target in targets for word in ("-t", target))]
    rest = {name: value for name, value in os.environ.items() if not name.startswith("TRAMONTANE_")}
    return subprocess.run(command, cwd=project, env=rest | env, capture_output=True, text=True, timeout=60, check=False)


def wheel_names(project: Path) -> tuple[str, set[str]]:
    """The wheel's platform, and the names of the files in it."""
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        return wheel.stem.rpartition("-")[2], set(opened.namelist())


def test_with_a_compiler_the_wheel_has_the_libraries_and_a_platform(project: Path) -> None:
    try:
        find_compiler()
    except BuildError as e:
        pytest.skip(str(e))
    done = build(project, "sdist", "wheel", TRAMONTANE_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    platform, names = wheel_names(project)
    assert platform == "linux_x86_64"
    assert names >= LIBRARIES
    (sdist,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        shipped = {Path(name).name for name in opened.getnames()}
    assert shipped >= {"build_mark.cpp", "simd.h", "build_hook.py"}
    assert not any(name.endswith(".so") for name in shipped), "the source distribution is for every platform"


def test_without_a_compiler_the_wheel_is_for_every_platform_unless_kernels_are_required(project: Path) -> None:
    done = build(project, "wheel", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no compiled kernels. There is no C++ compiler (no-such-compiler)." in " ".join(
        (done.stdout + done.stderr).split()
    )
    platform, names = wheel_names(project)
    assert platform == "any"
    assert not LIBRARIES & names
    assert "workers/native/cpp/build_mark.cpp" in names, "they can be compiled where the package is installed"
    failed = build(project, "wheel", CXX="no-such-compiler", TRAMONTANE_REQUIRE_NATIVE="1")
    assert failed.returncode != 0 and "There is no C++ compiler" in failed.stdout + failed.stderr
