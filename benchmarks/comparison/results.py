"""What was measured, as a JSON file that each run extends: one record for each part, subject and round. Knows no workloads."""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

MACHINE = "machine"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`error`: why there are no numbers. `note`: the machine in words, or the peer's version."""

    part: str
    subject: str
    metrics: dict[str, float] = {}
    error: str | None = None
    note: str = ""
    date: str = ""


class Results:
    def __init__(self, path: Path) -> None:
        """Reads the records of earlier runs, if there are any."""
        self._path = path
        self.records = msgspec.json.decode(path.read_bytes(), type=list[Record]) if path.exists() else []

    def add(
        self,
        part: str,
        subject: str,
        *,
        metrics: dict[str, float] | None = None,
        error: str | None = None,
        note: str = "",
    ) -> None:
        """Adds a record and writes the file. A new error takes the place of an older one; numbers take the place of an error."""
        self.records = [r for r in self.records if (r.part, r.subject) != (part, subject) or r.error is None]
        if error is not None and self.of(part, subject):
            return
        self.records.append(
            Record(part=part, subject=subject, metrics=metrics or {}, error=error, note=note, date=time.strftime("%F"))
        )
        self.write()

    def remove(self, parts: Sequence[str], subjects: Sequence[str]) -> None:
        """Forgets what was measured of these subjects in these parts."""
        self.records = [r for r in self.records if r.part not in parts or r.subject not in subjects]
        self.write()

    def write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(msgspec.to_builtins(self.records), indent=1) + "\n")
        partial.rename(self._path)

    def of(self, part: str, subject: str) -> list[Record]:
        return [r for r in self.records if (r.part, r.subject) == (part, subject) and r.error is None]

    def error(self, part: str, subject: str) -> str | None:
        return next((r.error for r in self.records if (r.part, r.subject) == (part, subject) and r.error), None)

    def note(self, part: str, subject: str) -> str:
        """The latest; empty if there is none."""
        return next((r.note for r in reversed(self.of(part, subject)) if r.note), "")

    def median(self, part: str, subject: str, metric: str) -> float | None:
        """Over all rounds; None if it was not measured."""
        values = [r.metrics[metric] for r in self.of(part, subject) if metric in r.metrics]
        return statistics.median(values) if values else None

    def spread(self, part: str, subject: str, metric: str) -> tuple[float, float] | None:
        """The smallest and the largest of all rounds."""
        values = [r.metrics[metric] for r in self.of(part, subject) if metric in r.metrics]
        return (min(values), max(values)) if values else None
