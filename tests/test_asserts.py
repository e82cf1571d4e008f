"""An assertion changes nothing: `python -O` leaves it out, and the program must do the same."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

# Names of methods and functions that change something.
CHANGES = """acquire add append clear close consume_token discard extend insert next pop popitem popleft put read recv release remove
    rollback send setdefault start stop try_consume_tokens update write"""
FILES = [path for unit in ("cluster", "workers") for path in sorted((ROOT / unit).rglob("*.py"))]


def effects(source: str) -> Iterator[str]:
    """The assertions that do more than to look."""
    for found in ast.walk(ast.parse(source)):
        if isinstance(found, ast.Assert):
            for node in ast.walk(found.test):
                name = ""
                if isinstance(node, ast.Call):
                    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if isinstance(node, ast.NamedExpr | ast.Await | ast.Yield) or name in CHANGES.split():
                    yield f"{found.lineno}: {ast.unparse(found)}"


def test_assertions_have_no_effects() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in effects(path.read_text())]
    assert not found, "do it in a statement of its own, before the assertion:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source", ["assert sizes.setdefault(k, 1) == 1", "assert (n := f()) > 1, n", "assert next(it)"]
)
def test_what_is_found(source: str) -> None:
    assert list(effects(source)) == [f"1: {source}"]


def test_a_look_is_fine() -> None:
    assert Path(__file__).exists()
    assert not list(effects("assert all(x.is_open() for x in self.parts) and len(y) == self.pool.num_free(), 'closed'"))
