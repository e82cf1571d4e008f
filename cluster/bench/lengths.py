"""How long prompts and answers are: a fixed number of tokens or a distribution. Knows nothing about tokens themselves.

    256             always 256                      normal:256:64      mean 256, standard deviation 64
    64-512          uniform, both ends included     lognormal:256:0.8  median 256, sigma 0.8 of the logarithm

Numbers below 1 become 1.
"""

import math
import random
import re
from dataclasses import dataclass
from typing import Literal

_MAX = 10_000_000


@dataclass(frozen=True)
class Lengths:
    """`text` is what the user wrote. a and b: both ends, mean and deviation, or median and sigma; a alone when fixed."""

    text: str
    kind: Literal["fixed", "uniform", "normal", "lognormal"]
    a: float
    b: float = 0.0

    def sample(self, rng: random.Random, num: int) -> list[int]:
        """`num` lengths, each at least 1."""
        return [min(_MAX, max(1, round(self._draw(rng)))) for _ in range(num)]

    def _draw(self, rng: random.Random) -> float:
        match self.kind:
            case "fixed":
                return self.a
            case "uniform":
                return rng.randint(int(self.a), int(self.b))
            case "normal":
                return rng.gauss(self.a, self.b)
            case "lognormal":
                return self.a * math.exp(rng.gauss(0.0, self.b))


def parse_lengths(text: str) -> Lengths:
    """Raises ValueError with the reason."""
    written = text.strip().lower()
    if match := re.fullmatch(r"\d{1,7}", written):
        if int(written) >= 1:
            return Lengths(text, "fixed", int(written))
    elif match := re.fullmatch(r"(\d{1,7})-(\d{1,7})", written):
        low, high = int(match[1]), int(match[2])
        if 1 <= low <= high:
            return Lengths(text, "uniform", low, high)
    elif match := re.fullmatch(r"(normal|lognormal):(\d{1,7}(?:\.\d+)?):(\d{1,7}(?:\.\d+)?)", written):
        kind: Literal["normal", "lognormal"] = "normal" if match[1] == "normal" else "lognormal"
        if float(match[2]) >= 1 and (kind == "normal" or float(match[3]) <= 5):
            return Lengths(text, kind, float(match[2]), float(match[3]))
    raise ValueError(
        f"{text!r} is not a number of tokens; write 256, 64-512, normal:MEAN:DEVIATION or lognormal:MEDIAN:SIGMA"
    )
