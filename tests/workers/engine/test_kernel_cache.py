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
    folders = [ROOT / "workers/kernels" / name for name in ("", "grouped", "layers", "lora", "sampling")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for folder in folders for path in folder.glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {
        f.name
        for f in functions
        if f.name.endswith("_kernel") and any("jit" in ast.unparse(d) for d in f.decorator_list)
    }


@pytest.mark.parametrize("size", kernel_cache.TENSOR_PARALLEL_SIZES)
def test_every_kernel_is_compiled(launched, size):
    for form in kernel_cache.FORMS:
        kernel_cache.launch_form(form, size)
    assert set(launched) == kernels(), "workers/engine/kernel_cache.py should launch each of them"
    attention = launched["attention_kernel"]
    forms = {(c["IS_SHORT"], c["IS_SPLIT"], c["WINDOW"]) for c in attention}
    assert forms == {
        (short, split, window) for short in (True, False) for split in (True, False) for window in (0, 4096)
    }
    assert {(c["NUM_HEADS"], c["BLOCK_SIZE"]) for c in attention} == {(32 // size, 16)}


@pytest.mark.parametrize(
    ("form", "constants"),
    [
        ("int4", {"NUM_BITS": 4, "GROUP_SIZE": 32, "OFFSET": 8, "HAS_MINIMA": False, "HALVES": True}),
        ("int8", {"NUM_BITS": 8, "GROUP_SIZE": 32, "OFFSET": 128, "HAS_MINIMA": False, "HALVES": True}),
        ("gptq", {"NUM_BITS": 4, "GROUP_SIZE": 128, "OFFSET": 8, "HAS_MINIMA": False, "HALVES": True}),
        ("awq", {"NUM_BITS": 4, "GROUP_SIZE": 128, "OFFSET": 0, "HAS_MINIMA": True, "HALVES": False}),
        ("fp8", {"NUM_BITS": 8, "OFFSET": -1, "HAS_MINIMA": False, "HALVES": False}),
    ],
)
def test_products_of_a_form_are_those_of_its_checkpoints(launched, form, constants):
    """For 1 to 16 rows and for more, and with outputs of narrow and wide weights, as grouped_matmul.choose_tile has them."""
    kernel_cache.launch_form(form, 1)
    products = launched["grouped_kernel"]
    assert all(constants.items() <= launch.items() for launch in products)
    tiles = {(launch["IN_FEATURES"], launch["ROWS"], launch["OUTPUTS"]) for launch in products}
    assert tiles == {(n, rows, outputs) for n, outputs in ((4096, 32), (4096, 64), (14_336, 32)) for rows in (16, 32)}


def test_the_command_divides_the_work(monkeypatch, capfd):
    done: list[tuple[int, int, str]] = []

    class InThisProcess:
        def __enter__(self) -> "InThisProcess":
            return self

        def __exit__(self, *_: object) -> None: ...

        map = staticmethod(map)

    monkeypatch.setattr(kernel_cache, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(kernel_cache, "compile_kernels", lambda *job: done.append(job) or 3)
    kernel_cache.main(["--capabilities", "80", "90", "--tensor-parallel-sizes", "1", "4", "--forms", "bfloat16"])
    assert done == [(80, 1, "bfloat16"), (80, 4, "bfloat16"), (90, 1, "bfloat16"), (90, 4, "bfloat16")]
    assert "compiled 12 kernels" in capfd.readouterr().err
