"""docs/architecture.md against the real tree: every folder is named, each named folder exists, and the ordered lists are the tests' own."""

import re

from support.documents import fences
from support.paths import ROOT
from test_imports import ORDER

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
INDENT = 2


def named() -> dict[str, str]:
    """Path -> its line in the page's tree. Folders end with a slash."""
    (tree,) = [fence for fence in fences(PAGE) if fence.kind == "" and fence.text.startswith("cluster/\n")]
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in tree.text.splitlines():
        match = re.fullmatch(r"( *)(\S+)(?: +(\S.*))?", line)
        assert match, f"no line of the tree: {line!r}"
        depth = len(match[1]) // INDENT
        path = "".join(parents[:depth]) + match[2]
        parents[depth:] = [match[2]]
        found[path] = match[3] or ""
    return found


def real() -> set[str]:
    """Every folder with files of its own, and the files that are units themselves."""
    found = set()
    for package in ORDER:
        for path in (ROOT / package).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if (
                path.is_dir()
                and "__pycache__" not in name
                and any(p.suffix in (".py", ".html", ".yaml", ".cpp") for p in path.iterdir())
            ):
                found.add(f"{name}/")
        files = (p.name for p in (ROOT / package).glob("*.py") if p.stem != "__init__")
        found |= {f"{package}/{name}" for name in files}
    return found - {"cluster/web/static/"}


def test_every_folder_is_named_and_each_exists() -> None:
    names = set(named()) - {f"{package}/" for package in ORDER}
    assert real() - names == set(), "docs/architecture.md lacks these in its tree"
    assert names - real() == set(), "docs/architecture.md names these, which do not exist"


def test_every_folder_has_a_line_that_says_what_it_is() -> None:
    assert [path for path, text in named().items() if not text and path.rstrip("/") not in ORDER] == []


def test_the_page_has_the_ordered_lists_that_the_test_holds() -> None:
    for package, order in ORDER.items():
        assert f"{package}: {order}\n" in PAGE, (
            f"the list of {package} in docs/architecture.md is not the one in tests/test_imports.py"
        )
