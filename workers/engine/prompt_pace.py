"""How many tokens of prompts a step may compute while other requests decode: each of these waits for the whole step.

Pure: takes counts and measured seconds, returns a number of tokens. Knows no requests and no clock.

Worked example: 8 requests decode in steps of 20 ms, one prompt waits, and each of its tokens adds 0.5 ms to a step. A step may take
40 ms, so it computes 40 tokens of the prompt. With 24 prompts waiting for those 8, it may take 80 ms and computes 120.
"""

# A step with prompts may take this many times as long as one that only decodes. More where prompts outnumber the requests that decode.
STRETCH = 2.0
# Every step reads all weights: fewer tokens take about as long.
MIN_TOKENS = 16
# Until steps with prompts have been measured.
FIRST_TOKENS = 64
# Of a new measurement in what is known. One step that took long for another reason counts as at most twice as long as expected.
WEIGHT = 0.25
MAX_SURPRISE = 2.0


class PromptPace:
    """Learns from every step, by `add`, how long steps take here."""

    def __init__(self, stretch: float = STRETCH) -> None:
        self._stretch = stretch
        # By the binary order of magnitude of how many decode: in a decode step, and then for each token of a prompt.
        self._decode_s: dict[int, float] = {}
        self._token_s: float | None = None

    def max_prompt_tokens(self, *, num_decoding: int, num_prompts: int) -> int:
        """For the next step, in which at least one request decodes. num_prompts: requests whose prompts are not computed yet."""
        # A step that is long for a few and lets many begin is better than many short ones that let these wait.
        extra = max(self._stretch - 1.0, num_prompts / num_decoding)
        decode_s = self._expected_decode_s(num_decoding)
        if decode_s is None or not self._token_s:
            return int(extra * FIRST_TOKENS)
        return max(MIN_TOKENS, int(extra * decode_s / self._token_s))

    def add(self, *, num_decoding: int, num_prompt_tokens: int, step_s: float) -> None:
        """A step has taken `step_s`."""
        if not num_prompt_tokens:
            size = num_decoding.bit_length()
            self._decode_s[size] = _mix(self._decode_s.get(size), step_s)
            return
        decode_s = self._expected_decode_s(num_decoding) if num_decoding else 0.0
        if decode_s is not None and step_s > decode_s:
            self._token_s = _mix(self._token_s, (step_s - decode_s) / num_prompt_tokens)

    def _expected_decode_s(self, num_decoding: int) -> float | None:
        size = num_decoding.bit_length()
        nearest = min(self._decode_s, key=lambda known: abs(known - size), default=None)
        return None if nearest is None else self._decode_s[nearest]


def _mix(known: float | None, measured: float) -> float:
    if known is None:
        return measured
    return known + WEIGHT * (min(measured, MAX_SURPRISE * known) - known)
