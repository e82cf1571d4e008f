"""What the checks found: doctor-style lines as they come, and one JSON file at the end. Knows no check."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["ok", "wrong", "slow", "left out", "measured"]
MARKS: Mapping[Status, str] = {"ok": "✓", "wrong": "✗", "slow": "!", "left out": "-", "measured": " "}


@dataclass(frozen=True, kw_only=True)
class Line:
    """`figures`: numbers by name, units in the names."""

    section: str
    name: str
    status: Status
    detail: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


class Report:
    """budget_s: sections that begin later are left out. clock: seconds."""

    def __init__(
        self, *, budget_s: float, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lines: list[Line] = []
        self._say = say
        self._clock = clock
        self._ends_at = clock() + budget_s
        self._section = ""

    @property
    def is_wrong(self) -> bool:
        return any(line.status == "wrong" for line in self.lines)

    @property
    def has_time(self) -> bool:
        return self._clock() < self._ends_at

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """An exception inside is a wrong line of the section, and the next section goes on."""
        self._section = name
        self._say(name)
        try:
            yield
        except Exception as e:  # whatever a kernel or a library raises is a finding
            first = (str(e).strip().splitlines() or [""])[0]
            self.add("the section ended early", "wrong", f"{type(e).__name__}: {first}")

    def add(self, name: str, status: Status, detail: str = "", **figures: float) -> None:
        line = Line(section=self._section, name=name, status=status, detail=detail, figures=figures)
        self.lines.append(line)
        numbers = ", ".join(f"{key} {value:,.4g}" for key, value in figures.items())
        words = "; ".join(part for part in (detail, numbers) if part)
        self._say(f"  {MARKS[status]} {name}{': ' + words if words else ''}")

    def check(self, name: str, is_right: bool, detail: str = "", **figures: float) -> None:
        self.add(name, "ok" if is_right else "wrong", detail, **figures)

    def target(self, name: str, share: float, target: float, **figures: float) -> None:
        """A figure beside its target. Missing one is not an error."""
        words = f"{share:.0%} of the limit, target {target:.0%}"
        self.add(name, "ok" if share >= target else "slow", words, share=share, target=target, **figures)

    def write(self, path: Path, facts: Mapping[str, object]) -> None:
        body = {"facts": facts, "is_wrong": self.is_wrong, "lines": [asdict(line) for line in self.lines]}
        path.write_text(json.dumps(body, indent=1) + "\n")
