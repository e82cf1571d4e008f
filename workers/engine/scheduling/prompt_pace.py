"""How many tokens of prompts a step may compute while other requests decode: each of these waits for the whole step.

Pure: takes counts and measured seconds, returns a number of tokens. Knows no requests and no clock.

Both sides cannot have it all: where a step takes F times as long as one that only decodes, a prompt takes F / (F - 1) times as long as
alone. Every step in between also costs the time of a decode step, so short steps cost throughput too.

Worked example: 8 requests decode in steps of 20 ms, one prompt waits, and each of its tokens adds 0.5 ms to a step. A step may take
100 ms, so it computes 160 tokens of the prompt. With 16 prompts waiting for those 8, it may take 220 ms and computes 400. Tokens that
attend to 4,000 others each may add 0.7 ms: then a step computes 114 of them.
"""

import math

from workers.config import EngineConfig

# A step with prompts may take this many times as long as one that only decodes: prompts take 1.25 times as long as alone.
STRETCH = EngineConfig.prompt_stretch
# But where decoding is so slow that a gap of this many seconds would follow, which a reader notices, only this many times as long.
LONG_GAP_S = 0.25
LONG_GAP_STRETCH = 2.0
# Every step reads all weights: fewer tokens take about as long.
MIN_TOKENS = 8
# Until steps with prompts have been measured.
FIRST_TOKENS = 64
# Of a new measurement in what is known. One step that took long for another reason counts as at most twice as long as expected.
WEIGHT = 0.25
MAX_SURPRISE = 2.0


class PromptPace:
    """Learns from every step, by `add`, how long steps take here. stretch: F above."""

    def __init__(self, *, stretch: float = STRETCH) -> None:
        self._stretch = stretch
        # By the binary order of magnitude of how many decode: the seconds of a decode step. Then those of each token of a prompt, next to
        # others and without: small parts of a prompt take longer for each token.
        self._decode_s: dict[int, float] = {}
        self._token_s = _TokenSeconds()
        self._token_alone_s = _TokenSeconds()

    def max_prompt_tokens(self, *, num_decoding: int, num_prompts: int, num_before: int = 0) -> int:
        """For the next step, in which at least one request decodes. num_prompts: requests whose prompts are not computed yet.
        num_before: tokens of the first of them that are.
        """
        # A step that is long for a few and lets many begin is better than many short ones that let these wait.
        burst = self._stretch * num_prompts / num_decoding
        decode_s = self._expected_decode_s(num_decoding)
        token_s = self._token_s if self._token_s.is_known else self._token_alone_s
        if decode_s is None or not token_s.is_known:
            return int(max(1.0, burst) * FIRST_TOKENS)
        long_s = min(self._stretch, LONG_GAP_STRETCH) * decode_s
        bound_s = max(min(self._stretch * decode_s, LONG_GAP_S), long_s)
        extra_s = max(bound_s - decode_s, burst * decode_s)
        return max(MIN_TOKENS, token_s.num_within(extra_s, num_before))

    def add(self, *, num_decoding: int, num_prompt_tokens: int, step_s: float, num_before: float = 0.0) -> None:
        """A step has taken `step_s`. num_before: how many tokens come before one of the prompts' in the step, on average."""
        if not num_prompt_tokens:
            size = num_decoding.bit_length()
            self._decode_s[size] = _mix(self._decode_s.get(size), step_s)
            return
        # A step without requests that decode reads all weights too.
        decode_s = self._expected_decode_s(max(1, num_decoding)) or 0.0
        if step_s > decode_s:
            seconds = self._token_s if num_decoding else self._token_alone_s
            seconds.add((step_s - decode_s) / num_prompt_tokens, num_before)

    def _expected_decode_s(self, num_decoding: int) -> float | None:
        size = num_decoding.bit_length()
        nearest = min(self._decode_s, key=lambda known: abs(known - size), default=None)
        return None if nearest is None else self._decode_s[nearest]


class _TokenSeconds:
    """What a token of a prompt adds to a step: `fixed`, and `each` for every token before it, which its attention reads.

    Both follow the measurements by normalized least mean squares (Nagumo and Noda, 1967), which needs no history.
    """

    # Of the second input. The smaller, the sooner a long prompt shows what the tokens before cost, and the more a single slow step says.
    SCALE = 250.0

    def __init__(self) -> None:
        self._fixed = self._each = 0.0

    @property
    def is_known(self) -> bool:
        return self._fixed + self._each > 0

    def add(self, seconds: float, num_before: float) -> None:
        """A token with so many before it took `seconds`."""
        if not self.is_known:
            self._fixed = seconds
            return
        expected = self._fixed + self._each * num_before
        error = min(seconds, MAX_SURPRISE * expected) - expected
        before = num_before / self.SCALE
        step = WEIGHT * error / (1 + before * before) * (1 + min(1.0, before))
        self._fixed = max(0.0, self._fixed + step)
        self._each = max(0.0, self._each + step * before / self.SCALE)

    def num_within(self, seconds: float, num_before: int) -> int:
        """How many tokens that follow on `num_before` take that long together: n * (fixed + each * (num_before + n / 2)) seconds."""
        first = self._fixed + self._each * num_before
        # Rounding must not cost a token.
        return int(2 * seconds / (first + math.sqrt(first * first + 2 * self._each * seconds)) + 1e-6)


def _mix(known: float | None, measured: float) -> float:
    if known is None:
        return measured
    return known + WEIGHT * (min(measured, MAX_SURPRISE * known) - known)
