"""How many tokens of prompts a step may compute while other requests decode: each of these waits for the whole step.

Pure: takes counts and measured seconds, returns a number of tokens. Knows no requests and no clock.

Both sides cannot have it all: where a step takes F times as long as one that only decodes, a prompt takes F / (F - 1) times as long as
alone. Every step in between also costs the time of a decode step, so short steps cost throughput too.

Worked example: 8 requests decode in steps of 20 ms, one prompt waits, and each of its tokens adds 0.5 ms to a step. A step may take
100 ms, so it computes 160 tokens of the prompt. With 16 prompts waiting for those 8, it may take 220 ms and computes 400.
"""

# A step with prompts may take this many times as long as one that only decodes: prompts take 1.25 times as long as alone.
STRETCH = 5.0
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
    """Learns from every step, by `add`, how long steps take here."""

    def __init__(self) -> None:
        # By the binary order of magnitude of how many decode: the seconds of a decode step. Then those of each token of a prompt.
        self._decode_s: dict[int, float] = {}
        self._token_s: float | None = None

    def max_prompt_tokens(self, *, num_decoding: int, num_prompts: int) -> int:
        """For the next step, in which at least one request decodes. num_prompts: requests whose prompts are not computed yet."""
        # A step that is long for a few and lets many begin is better than many short ones that let these wait.
        burst = STRETCH * num_prompts / num_decoding
        decode_s = self._expected_decode_s(num_decoding)
        if decode_s is None or not self._token_s:
            return int(max(1.0, burst) * FIRST_TOKENS)
        bound_s = max(min(STRETCH * decode_s, LONG_GAP_S), LONG_GAP_STRETCH * decode_s)
        extra_s = max(bound_s - decode_s, burst * decode_s)
        return max(MIN_TOKENS, int(extra_s / self._token_s))

    def add(self, *, num_decoding: int, num_prompt_tokens: int, step_s: float) -> None:
        """A step has taken `step_s`."""
        if not num_prompt_tokens:
            size = num_decoding.bit_length()
            self._decode_s[size] = _mix(self._decode_s.get(size), step_s)
            return
        # A step without requests that decode reads all weights too.
        decode_s = self._expected_decode_s(max(1, num_decoding)) or 0.0
        if step_s > decode_s:
            self._token_s = _mix(self._token_s, (step_s - decode_s) / num_prompt_tokens)

    def _expected_decode_s(self, num_decoding: int) -> float | None:
        size = num_decoding.bit_length()
        nearest = min(self._decode_s, key=lambda known: abs(known - size), default=None)
        return None if nearest is None else self._decode_s[nearest]


def _mix(known: float | None, measured: float) -> float:
    if known is None:
        return measured
    return known + WEIGHT * (min(measured, MAX_SURPRISE * known) - known)
