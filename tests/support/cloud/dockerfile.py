"""Reads a Dockerfile for tests: its stages and instructions, and the files in its build context.

Knows the patterns that our ignore files use (`*`, a path, `!` before it, `**/NAME`) and refuses others rather than guess.
"""

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from dockerfile_parse import DockerfileParser


@dataclass(frozen=True, kw_only=True)
class Instruction:
    name: str
    value: str
    stage: int  # which FROM it belongs to; -1 before the first

    def words(self) -> list[str]:
        """The instruction without its flags."""
        return [word for word in self.value.split() if not word.startswith("--")]


def instructions(path: Path) -> list[Instruction]:
    stage, found = -1, []
    for item in DockerfileParser(path=str(path)).structure:
        stage += item["instruction"] == "FROM"
        if item["instruction"] != "COMMENT":
            found.append(Instruction(name=item["instruction"], value=item["value"], stage=stage))
    return found


def context_files(root: Path, ignore_file: Path, files: list[str]) -> list[str]:
    """The `files`, relative to `root`, that a build sends. The last matching pattern decides, as in Docker."""
    patterns = [line.strip() for line in ignore_file.read_text().splitlines()]
    patterns = [line for line in patterns if line and not line.startswith("#")]
    return [name for name in files if not _is_ignored(name, patterns) and (root / name).is_file()]


def _is_ignored(name: str, patterns: list[str]) -> bool:
    ignored = False
    for pattern in patterns:
        body = pattern.removeprefix("!")
        if body.startswith("**/"):
            matches = any(fnmatch.fnmatchcase(part, body[3:]) for part in name.split("/"))
        elif body == "*":
            matches = True
        else:
            assert "*" not in body, f"{pattern} is a pattern that this test does not know"
            matches = name == body or name.startswith(f"{body}/")
        if matches:
            ignored = not pattern.startswith("!")
    return ignored
