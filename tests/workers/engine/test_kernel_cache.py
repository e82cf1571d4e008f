"""What is compiled ahead of time: every kernel, in every form that the engine launches."""

import ast
from collections import defaultdict
from typing import Any

import pytest
from support.paths import ROOT
from triton.runtime.interpreter import InterpretedFunction

from workers.engine import kernel_cache


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """Kernel -> the constants of each launch. The kernels do not run."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def record(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        found[self.fn.__name__].append(constants)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return found


def kernels() -> set[str]:
    """The Triton functions that are launched: those whose name ends so."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "workers/kernels").glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {
        f.name
        for f in functions
        if f.name.endswith("_kernel") and any("jit" in ast.unparse(d) for d in f.decorator_list)
    }


@pytest.mark.parametrize("size", kernel_cache.TENSOR_PARALLEL_SIZES)
def test_every_kernel_is_compiled(launched, size):
    kernel_cache.launch_all(size)
    assert set(launched) == kernels(), "workers/engine/kernel_cache.py should launch each of them"
    attention = launched["attention_kernel"]
    forms = {(c["IS_SHORT"], c["IS_SPLIT"], c["WINDOW"]) for c in attention}
    assert forms == {
        (short, split, window) for short in (True, False) for split in (True, False) for window in (0, 4096)
    }
    assert {(c["NUM_HEADS"], c["BLOCK_SIZE"]) for c in attention} == {(32 // size, 16)}


def test_the_command_divides_the_work(monkeypatch, capfd):
    done: list[tuple[int, int]] = []

    class InThisProcess:
        def __enter__(self) -> "InThisProcess":
            return self

        def __exit__(self, *_: object) -> None: ...

        map = staticmethod(map)

    monkeypatch.setattr(kernel_cache, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(kernel_cache, "compile_kernels", lambda *job: done.append(job) or 3)
    kernel_cache.main(["--capabilities", "80", "90", "--tensor-parallel-sizes", "1", "4"])
    assert done == [(80, 1), (80, 4), (90, 1), (90, 4)]
    assert "compiled 12 kernels" in capfd.readouterr().err
