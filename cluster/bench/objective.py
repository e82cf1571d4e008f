"""The objective that a request must meet to count for goodput: limits on its times. Knows no request's fields beyond these times.

ttft=500ms,gap=50ms     time to first token at most 500 ms, and at most 50 ms a token after it on average
max_gap=200ms,e2e=10s   no gap longer than 200 ms, the whole answer within 10 s
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
NAMES = ("ttft", "gap", "max_gap", "e2e")


@dataclass(frozen=True)
class Objective:
    """limits_s: name of a time -> the most seconds it may take. `text` is what the user wrote."""

    text: str
    limits_s: Mapping[str, float]

    def is_met(self, times_s: Mapping[str, float | None]) -> bool:
        """times_s: all of NAMES; None, as the gap of a single token, meets every limit."""
        return all((value := times_s[name]) is None or value <= limit for name, limit in self.limits_s.items())


def parse_objective(text: str) -> Objective:
    """Raises ValueError with the reason."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z_0-9]+)\s*=\s*(\d+(?:\.\d+)?)\s*(us|ms|s|m)\s*", part.lower())
        if match is None or match[1] not in NAMES:
            raise ValueError(
                f"{part.strip()!r} is not a limit; write {', '.join(NAMES)}, =, and a time, as in ttft=500ms"
            )
        limits[match[1]] = float(match[2]) * _UNITS_S[match[3]]
    return Objective(text, limits)
