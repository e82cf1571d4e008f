"""The import rules of the design, read off the source: which layer may know which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEAM = {"workers.protocol", "workers.config", "workers.errors", "workers.grammar"}
AIOHTTP_CLIENTS = {"cluster/cloud/metadata.py"}
RAY_FILES = {"cluster/cli.py", "cluster/serve.py"}
# Engine parts that decide and do not compute; the tests of the layers above them must stay quick.
NO_TORCH = {
    f"workers/engine/{name}.py"
    for name in ("request", "block_pool", "kv_cache_manager", "scheduler", "loop", "constraint")
}
NO_TORCH |= {
    f"workers/{name}.py"
    for name in ("protocol", "config", "errors", "grammar", "stream_server", "connection", "cache_diff")
}
NO_TORCH |= {f"workers/{name}.py" for name in ("shard", "lifeline", "rank_process", "probe")}
NO_TORCH |= {"workers/model/weight_files.py", "workers/parallel/interface.py"}
# Late imports, inside a function, by the places that start what the design says the control plane does not know.
MAY_SEE = {
    "cluster/replicas/replica.py": {"workers.shard"},
    "cluster/generate.py": {"workers.engine.llm_engine"},
    "cluster/replicas/probe_ranks.py": {"workers.probe"},
    "cluster/cloud/doctor/machine.py": {"workers.parallel.interface"},
    "cluster/cloud/doctor/model_files.py": {"workers.model.weight_files"},
    "cluster/cloud/plan/models.py": {"workers.model.weight_files"},
}
SUBCLASSES = {
    ("cluster/replicas/rank_actor.py", "workers.shard")
}  # the actor is a ShardWorker, and imports no torch either


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at import time) of every import in the file, those for type checkers left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; this project writes absolute ones"
            yield node.module or "", id(node) not in inside


def violations(package: str, is_wrong) -> list[str]:
    found = []
    for path in sources(package):
        name = path.relative_to(ROOT).as_posix()
        found += [
            f"{name} imports {module}" for module, at_import in imports(path) if is_wrong(name, module, at_import)
        ]
    return found


def test_workers_know_nothing_of_the_control_plane():
    assert violations("workers", lambda _, module, __: module.split(".")[0] in ("cluster", "aiohttp", "ray")) == []


def test_the_control_plane_sees_only_the_seam_of_workers():
    def is_wrong(name: str, module: str, at_import: bool) -> bool:
        if module.split(".")[0] != "workers" or module in SEAM or (name, module) in SUBCLASSES:
            return False
        return at_import or module not in MAY_SEE.get(name, set())

    assert violations("cluster", is_wrong) == []


def test_ray_stays_with_the_replicas():
    def is_wrong(name: str, module: str, _: bool) -> bool:
        return module.split(".")[0] == "ray" and not name.startswith("cluster/replicas/") and name not in RAY_FILES

    assert violations("cluster", is_wrong) == []


def test_aiohttp_stays_with_the_http_surface():
    def is_wrong(name: str, module: str, _: bool) -> bool:
        is_allowed = name.startswith("cluster/api/") or name in AIOHTTP_CLIENTS
        return module.split(".")[0] == "aiohttp" and not is_allowed

    assert violations("cluster", is_wrong) == []


@pytest.mark.parametrize("lower", ["text", "router"])
def test_nothing_imports_upward(lower):
    above = ("cluster.api", "cluster.replicas", "cluster.serve", "cluster.cli")
    values = {"cluster.replicas.state"}  # what the router tells whoever scales: frozen, without behaviour
    wrong = violations(f"cluster/{lower}", lambda _, m, __: m.startswith(above) and m not in values)
    assert wrong == []


def test_deciding_parts_of_the_engine_import_no_torch():
    wrong = violations("workers", lambda name, m, at_import: name in NO_TORCH and at_import and m.startswith("torch"))
    assert wrong == []


def test_importing_the_control_plane_imports_no_torch():
    modules = [
        p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for p in sources("cluster")
    ]
    modules.append("workers.shard")  # what replica.py imports to start actors
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", "something in cluster imports torch"
