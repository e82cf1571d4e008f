"""Libraries whose private parts are used: pinned to exactly one version, each from one file, and what that file relies on is still there.

A private part may change in any release. When a pin moves, these tests say which file to look at and what it relies on.
"""

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

import pytest
from support.paths import ROOT


class Pin(NamedTuple):
    files: tuple[str, ...]  # the only ones that use private parts
    relies_on: str


PINS = {
    "ray": Pin(
        ("cluster/ray_runtime/internals.py",),
        "ray.init(_temp_dir, _system_config), ray._private.state, global_worker.gcs_client.drain_node, "
        "global_worker.node.get_temp_dir_path, autoscaler_pb2.DrainNodeReason, ray.experimental.internal_kv",
    ),
    "aiohttp": Pin(
        ("cluster/api/server/http_connection.py",),
        "web_protocol._ErrInfo, and of web.RequestHandler: _current_request, _messages, _waiter, _close, _force_close, _loop, "
        "data_received and finish_response",
    ),
    "gguf": Pin(
        ("workers/checkpoint/gguf/gguf_reader.py",),
        "GGUFReader._get_field_parts and _build_tensors, which its class overrides",
    ),
    "torch": Pin(
        ("workers/quant/dense.py", "workers/quant/pack_cuda.py", "workers/engine/execution/graphs/cpu_graphs.py"),
        "torch.ops.mkldnn._linear_pointwise and _reorder_linear_weight, oneDNN's packed weights; torch._scaled_mm; "
        "torch.utils._python_dispatch and which operators of aten a step calls",
    ),
}


def pinned_versions() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = (re.match(r"([\w.-]+)(?:\[\w+\])?==(\S+)$", requirement) for requirement in project["dependencies"])
    return {match[1]: match[2] for match in found if match is not None}


@pytest.mark.parametrize("library", PINS)
def test_the_installed_version_is_the_pinned_one(library: str) -> None:
    pin = PINS[library]
    where = f"{', '.join(pin.files)} relies on private parts of {library} ({pin.relies_on})"
    pinned = pinned_versions().get(library)
    assert pinned is not None, f"pyproject.toml must pin {library} with ==: {where}."
    installed = version(library).partition("+")[0]
    assert installed == pinned, (
        f"{library} {installed} is installed, pyproject.toml pins {pinned}. {where}: compare these parts with the new release, run the "
        "tests of that file and of tests/system, then move the pin in pyproject.toml and constraints.txt."
    )
    assert f"{library}=={pinned}\n" in (ROOT / "constraints.txt").read_text(), "constraints.txt has another version"


def private_uses(source: str, library: str) -> Iterator[tuple[int, str]]:
    """(line, code) of each import or attribute of the library with a leading underscore, and of private modules by another name."""
    if library not in source:
        return
    for node in nodes_of(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for a in node.names if a.name.split(".")[0] == library for part in a.name.split(".")]
        elif isinstance(node, ast.Attribute) and names_of(node)[-1] == library:
            names = names_of(node)
        elif isinstance(node, ast.Call) and names_of(node.func)[-1] == library:
            names = [str(keyword.arg) for keyword in node.keywords if keyword.arg is not None]
        else:
            continue
        if any(_is_private(name) for name in names):
            yield node.lineno, ast.unparse(node)


@cache
def nodes_of(source: str) -> list[ast.AST]:
    return [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom | ast.Import | ast.Attribute | ast.Call)
    ]


def names_of(node: ast.expr) -> list[str]:
    """[c, b, a] of `a.b[0].c()`. The last one is empty where an expression of another kind comes first."""
    names = []
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        node = node.func if isinstance(node, ast.Call) else node.value
    return [*names, node.id if isinstance(node, ast.Name) else ""]


def _is_private(name: str) -> bool:
    return (name.startswith("_") and not name.startswith("__")) or name == "internal_kv"


@pytest.mark.parametrize("library", PINS)
def test_private_parts_are_used_where_the_table_says(library: str) -> None:
    found = []
    for package in ("cluster", "workers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name not in PINS[library].files:
                found += [f"{name}:{line}: {code}" for line, code in private_uses(path.read_text(), library)]
    assert not found, f"belongs into {PINS[library].files}:\n" + "\n".join(found)


def test_each_such_file_uses_them() -> None:
    for library, pin in PINS.items():
        for file in pin.files:
            assert list(private_uses((ROOT / file).read_text(), library)), f"{file} needs no exact pin any more"


def test_no_other_library_needs_a_pin() -> None:
    found = []
    for path in [*(ROOT / "cluster").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]:
        source = path.read_text()
        modules = {
            name.split(".")[0]
            for node in nodes_of(source)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        for library in modules - set(PINS) - {"cluster", "workers"} - set(sys.stdlib_module_names):
            found += [f"{path.relative_to(ROOT)}:{line}: {code}" for line, code in private_uses(source, library)]
    assert not found, "pin the library exactly and add it to PINS:\n" + "\n".join(found)


def test_private_uses_are_found() -> None:
    source = "import ray\nfrom ray._private.state import x\nfrom ray.util import y\nray._private.z()\nray.init(_temp_dir='')\nray.get(1)"
    assert {line for line, _ in private_uses(source, "ray")} == {2, 4, 5}


def test_what_is_relied_on_in_ray_is_there() -> None:
    import ray
    from ray._private.state import GlobalState, available_resources_per_node
    from ray._private.worker import global_worker
    from ray._raylet import InnerGcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

    look_at = f"look at {PINS['ray'].files}"
    assert {"kwargs"} <= set(inspect.signature(ray.init).parameters), look_at
    assert callable(GlobalState.get_draining_nodes) and callable(available_resources_per_node), look_at
    assert hasattr(InnerGcsClient, "drain_node") and hasattr(global_worker, "node"), look_at
    assert DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), look_at
    for function in (_internal_kv_del, _internal_kv_get, _internal_kv_put):
        assert "namespace" in inspect.signature(function).parameters, look_at


def test_what_is_relied_on_in_aiohttp_is_there() -> None:
    from aiohttp.web_protocol import RequestHandler, _ErrInfo

    attributes = {name for base in RequestHandler.__mro__ for name in getattr(base, "__slots__", ())}
    relied_on = {"_current_request", "_messages", "_waiter", "_close", "_force_close", "_loop"}
    assert relied_on <= attributes, f"look at {PINS['aiohttp'].files}: {relied_on - attributes}"
    assert {"status", "exc", "message"} <= set(inspect.signature(_ErrInfo).parameters), "look at _ErrInfo"


def test_what_is_relied_on_in_gguf_is_there() -> None:
    import gguf

    look_at = f"look at {PINS['gguf'].files}"
    assert list(inspect.signature(gguf.GGUFReader._get_field_parts).parameters) == ["self", "orig_offs", "raw_type"], (
        look_at
    )
    assert list(inspect.signature(gguf.GGUFReader._build_tensors).parameters) == ["self", "start_offs", "fields"], (
        look_at
    )
