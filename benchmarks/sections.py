"""Sections of a page of results that several scripts write: each replaces its own and keeps the others. Knows headings, no results."""

from collections.abc import Sequence
from pathlib import Path

MARK = "## "


def kept_sections(path: Path) -> str:
    """All sections of the page, with their headings; without what comes before the first of them."""
    _, found, rest = (path.read_text() if path.exists() else "").partition(f"\n{MARK}")
    return found + rest


def write_section(path: Path, section: Sequence[str]) -> None:
    """section: lines, the first of them its heading. Replaces the section with this heading, or adds it at the end."""
    parts = (path.read_text() if path.exists() else "").split(f"\n{MARK}")
    heading = section[0].removeprefix(MARK)
    kept = [part.strip("\n") for part in parts if part.partition("\n")[0] != heading]
    path.write_text(f"\n\n{MARK}".join([*kept, "\n".join(section).removeprefix(MARK)]) + "\n")
