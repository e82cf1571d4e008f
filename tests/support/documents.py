"""The Markdown pages of this repository, and what tests read off them: fences, links, code spans, headings. Knows no page by name."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>[^\n`]*)\n(?P<text>.*?)^ *```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


class Fence(NamedTuple):
    kind: str  # the language after the three backticks
    text: str
    line: int  # of the opening backticks


def pages() -> list[Path]:
    """The README, the other pages of the root, everything in docs/, and the pages next to the benchmarks and the demo model."""
    folders = (ROOT / "docs", ROOT / "benchmarks", ROOT / "examples")
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return sorted(path for path in found if not path.name.endswith("_template.md"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(text: str) -> Iterator[Fence]:
    for match in _FENCE.finditer(text):
        yield Fence(match["kind"].strip(), match["text"], text.count("\n", 0, match.start()) + 1)


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """The targets of all links, as they are written."""
    return _LINK.findall(without_fences(text))


def spans(text: str) -> list[str]:
    """Inline code."""
    return _SPAN.findall(without_fences(text))


def anchors(text: str) -> set[str]:
    """What `#...` may name: GitHub's slugs of the headings."""
    headings = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in _HEADING.findall(without_fences(text)))
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}
