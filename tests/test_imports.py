"""The house rules of imports, read off the source: one ordered list of units, and what each package may use from outside.

An import may only point to the right in the list; units of one rank do not import each other. Late imports, inside a function, and
imports for type checkers count like any other.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from support.paths import ROOT

ORDER = {
    "cluster": (
        "cli > gateway > doctor, controller > replicas > ray_runtime, api > adapters, metrics, plan, profile "
        "> batch, bench, eval, keys, config, autoscaler, router > responses > tracing > text, system, protocol > terminal"
    ),
    "workers": (
        "rank, gpu_check > profile > engine > speculative > kv_cache, sampling > model, weights > layers > quant, lora, attention "
        "> kernels > native > parallel > tokenizer_files > checkpoint, device > config > model_numbers "
        "> layer_groups, rank_shares, rope, stored_weights, heartbeat, process_identity, thread_priority, tracing > protocol > errors"
    ),
}
# All that the control plane may import of workers/, and by whom. Nothing of it imports torch when it is imported.
SEAM = {
    "workers.protocol",
    "workers.checkpoint.gguf.gguf_config",
    "workers.checkpoint.gguf.gguf_file",
    "workers.checkpoint.model_config",
    "workers.checkpoint.regular_file",
    "workers.config",
    "workers.device.cpu",
    "workers.device.fit",
    "workers.device.memory",
    "workers.device.model_bytes",
    "workers.device.probe",
    "workers.device.sizes",
    "workers.errors",
    "workers.heartbeat",
    "workers.lora.peft_folder",
    "workers.native.bfloat16",
    "workers.process_identity",
    "workers.profile.recording",
    "workers.profile.spans",
    "workers.profile.targets",
    "workers.rank.reports",
    "workers.thread_priority",
    "workers.tracing.attributes",
    "workers.tracing.settings",
    "workers.tracing.tracer",
    "workers.tokenizer_files.gguf_model",
    "workers.tokenizer_files.opening",
    "workers.tokenizer_files.pieces",
    "workers.tokenizer_files.sentencepiece_model",
    "workers.tokenizer_files.tekken_model",
    "workers.tokenizer_files.tokenizer_json",
}
DOORS = {
    "cluster/replicas/rank_actor.py": {"workers.rank.worker"},
    "cluster/cli/generate.py": {"workers.engine.llm_engine", "workers.profile.steps"},
    "cluster/cli/doctor.py": {"workers.gpu_check.main"},
    "cluster/doctor/all_reduce.py": {"workers.rank.probe"},
    "cluster/doctor/machine.py": {"workers.native.library", "workers.parallel.interface"},
    "cluster/config/checkpoint_check.py": {
        "workers.weights.completeness",
        "workers.weights.files",
        "workers.weights.header",
        "workers.weights.left_out",
    },
    "cluster/config/dtype.py": {"workers.weights.files", "workers.weights.header"},
    "cluster/text/grammar/compiler.py": {"workers.sampling.vocabulary"},
}
# The only units that may use a library, by its top-level module.
OWNERS = {
    "ray": (
        "cluster/ray_runtime/",
        "cluster/replicas/",
        "cluster/controller/",
        "cluster/doctor/",
        "cluster/gateway/actor.py",
    ),
    "aiohttp": ("cluster/api/", "cluster/controller/preemption/metadata.py"),
    "opentelemetry": ("cluster/tracing/",),
}
# Parts that decide and do not compute: their tests must stay quick, so they import no torch.
NO_TORCH = (
    "workers/protocol.py",
    "workers/checkpoint/",
    "workers/config.py",
    "workers/layer_groups.py",
    "workers/model_numbers.py",
    "workers/rope.py",
    "workers/device/",
    "workers/errors.py",
    "workers/heartbeat.py",
    "workers/process_identity.py",
    "workers/thread_priority.py",
    "workers/tracing/",
    "workers/tokenizer_files/",
    "workers/engine/scheduling/",
    "workers/engine/loop.py",
    "workers/lora/peft_config.py",
    "workers/lora/peft_folder.py",
    "workers/lora/slots.py",
    "workers/kv_cache/block_pool.py",
    "workers/kv_cache/manager.py",
    "workers/kv_cache/diff.py",
    "workers/sampling/grammar.py",
    "workers/sampling/vocabulary.py",
    "workers/weights/completeness.py",
    "workers/weights/files.py",
    "workers/weights/header.py",
    "workers/weights/left_out.py",
    "workers/weights/names.py",
    "workers/native/build.py",
    "workers/native/library.py",
    "workers/native/openmp.py",
    "workers/native/variants.py",
    "workers/parallel/interface.py",
    "workers/profile/recording.py",
    "workers/profile/spans.py",
    "workers/profile/targets.py",
    "workers/rank/",
)


class Import(NamedTuple):
    path: str  # of the file that imports, from the root
    line: int
    module: str  # for `from a import b`: a.b where that is a module, else a
    is_late: bool  # not at import time: inside a function, or for type checkers

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports_of(source: str, path: str) -> Iterator[Import]:
    """Every import of a file, wherever it stands."""
    tree = ast.parse(source)
    late = {id(child) for node in ast.walk(tree) if _runs_late(node) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name, id(node) in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; this project writes absolute ones"
            module = str(node.module)
            names = [f"{module}.{a.name}" if is_module(f"{module}.{a.name}") else module for a in node.names]
            yield from (Import(path, node.lineno, name, id(node) in late) for name in dict.fromkeys(names))


def _runs_late(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


@cache
def all_imports(package: str) -> list[Import]:
    files = [(p.read_text(encoding="utf-8"), p.relative_to(ROOT).as_posix()) for p in sources(package)]
    return [found for source, path in files for found in imports_of(source, path)]


def found(package: str, is_wrong: Callable[[Import], bool]) -> list[str]:
    return [str(i) for i in all_imports(package) if is_wrong(i)]


def ranks_of(order: str) -> dict[str, int]:
    """Unit -> its place in the list, 0 for the leftmost."""
    return {unit.strip(): rank for rank, units in enumerate(order.split(">")) for unit in units.split(",")}


def unit_of(module: str) -> str:
    """`cluster.api.app` is in the unit `api`; the package itself is in none, ""."""
    return [*module.split("."), ""][1]


def broken_rule(i: Import, package: str, ranks: dict[str, int]) -> str | None:
    """The sentence that says which rule the import breaks; None where it breaks none."""
    here, there = unit_of(i.path.removesuffix(".py").replace("/", ".")), unit_of(i.module)
    if i.module.split(".")[0] != package or there in ("", here) or here == "__init__":
        return None
    unknown = [unit for unit in (here, there) if unit not in ranks]
    if unknown:
        return (
            f"{i}: {package}/{unknown[0]} is not in the ordered list; give it a place there and in docs/architecture.md"
        )
    if ranks[there] == ranks[here]:
        return f"{i}: {here} and {there} have the same rank, and units of one rank do not import each other"
    if ranks[there] < ranks[here]:
        return f"{i}: {there} stands left of {here}, and an import may only point to the right: {ORDER[package]}"
    return None


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    ranks = ranks_of(ORDER[package])
    broken = [sentence for i in all_imports(package) if (sentence := broken_rule(i, package, ranks))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "line", "words"),
    [
        ("cluster/text/load.py", "from cluster.config.serve import ServeConfig", "stands left of text"),
        ("cluster/text/load.py", "def f():\n    import cluster.api.app", "stands left of text"),
        ("cluster/keys/key.py", "from cluster.router import router", "same rank"),
        ("cluster/elsewhere/new.py", "from cluster.terminal import tables", "not in the ordered list"),
        (
            "workers/layers/linear.py",
            "if TYPE_CHECKING:\n    from workers.model.mistral import KVCaches",
            "stands left of layers",
        ),
    ],
)
def test_the_rule_is_named_with_file_and_line(path: str, line: str, words: str) -> None:
    package = path.partition("/")[0]
    (broken,) = [
        sentence for i in imports_of(line, path) if (sentence := broken_rule(i, package, ranks_of(ORDER[package])))
    ]
    assert words in broken
    assert broken.startswith(f"{path}:{line.count(chr(10)) + 1} ")


def test_every_unit_is_in_the_list() -> None:
    """A folder without imports of its own would slip through the test above."""
    for package, order in ORDER.items():
        units = {p.stem for p in (ROOT / package).iterdir() if p.suffix == ".py" or any(p.glob("**/*.py"))}
        assert units - {"__init__", "__pycache__"} <= set(ranks_of(order))


def test_files_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for package in ORDER:
        for i in all_imports(package):
            here = i.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            graph.setdefault(here, set())
            if i.module.split(".")[0] in ORDER and is_module(i.module):
                graph[here].add(i.module)
    assert circle_in(graph) is None


def circle_in(graph: dict[str, set[str]]) -> str | None:
    """One circle, written a -> b -> a; None where there is none. Depth first, with the path in hand."""
    done: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> str | None:
        if node in path:
            return " -> ".join([*path[path.index(node) :], node])
        if node in done:
            return None
        for successor in sorted(graph.get(node, ())):
            if circle := visit(successor, (*path, node)):
                return circle
        done.add(node)
        return None

    return next((circle for node in sorted(graph) if (circle := visit(node, ()))), None)


def test_a_circle_is_found_and_named() -> None:
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": set()}) is None
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == "b -> c -> b"


def test_workers_know_nothing_of_the_control_plane() -> None:
    assert found("workers", lambda i: i.module.split(".")[0] in ("cluster", "aiohttp", "ray")) == []


def test_the_control_plane_sees_only_the_seam_of_workers() -> None:
    def is_wrong(i: Import) -> bool:
        return i.module.startswith("workers.") and i.module not in SEAM | DOORS.get(i.path, set())

    assert found("cluster", is_wrong) == []


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_stays_with_its_owners(library: str) -> None:
    wrong = found("cluster", lambda i: i.module.split(".")[0] == library and not i.path.startswith(OWNERS[library]))
    assert wrong == []


def test_deciding_parts_of_the_engine_import_no_torch() -> None:
    def is_wrong(i: Import) -> bool:
        return i.path.startswith(NO_TORCH) and not i.is_late and i.module.split(".")[0] == "torch"

    assert found("workers", is_wrong) == []
    assert all((ROOT / path).exists() for path in NO_TORCH)


def test_importing_the_control_plane_imports_no_torch_and_no_opentelemetry() -> None:
    modules = [
        p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for p in sources("cluster")
    ]
    modules.append("workers.rank.worker")  # what rank_actor.py imports
    # OpenTelemetry is imported where traces have somewhere to go: it takes a third of a second.
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        "print([m for m in ('torch', 'opentelemetry') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "something in cluster imports these"
