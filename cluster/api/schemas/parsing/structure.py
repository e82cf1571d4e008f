"""Bounds the nesting and the number of values of a JSON text, before any objects are made from it. Knows bytes; decodes nothing.

Array arithmetic does not block other threads: about 100 ms for 8 MB. It works on one window of the text after the other, since its arrays
take 20 bytes for each byte of a window.
"""

import numpy as np

from workers.errors import RequestError

MAX_CONTAINERS = 100_000
MAX_VALUES = 2_000_000  # mostly token ids
MAX_DEPTH = 64  # of nested lists and objects; a hand-written JSON schema has about a dozen levels
WINDOW_BYTES = 256 * 1024

_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


def check_structure(body: bytes) -> None:
    """Raises RequestError for JSON that is nested too deeply or has too many values.

    Counts brackets and commas outside of strings. The result is meaningless for invalid JSON, which the decoder refuses.
    """
    counter = _Counter()
    for start in range(0, len(body), WINDOW_BYTES):
        counter.add(np.frombuffer(body, np.uint8, min(WINDOW_BYTES, len(body) - start), start))
        if counter.max_depth > MAX_DEPTH:
            raise RequestError(
                f"The request body nests lists and objects more than {MAX_DEPTH} levels deep.",
                remedy="Flatten it.",
                code="invalid_json",
            )
    for number, most, what in (
        (counter.num_containers, MAX_CONTAINERS, "lists and objects"),
        (counter.num_containers + counter.num_commas, MAX_VALUES, "values"),
    ):
        if number > most:
            raise RequestError(
                f"The request body has {number:,} {what}; the limit is {most:,}.",
                remedy="Split it into several requests.",
                code="request_too_large",
            )


class _Counter:
    """What was counted so far, and where the text so far ends: how deep, in a string or not, after how many backslashes."""

    def __init__(self) -> None:
        self.num_containers = 0
        self.num_commas = 0
        self.max_depth = 0
        self._depth = 0
        self._num_quotes = 0
        self._num_backslashes = 0

    def add(self, codes: np.ndarray) -> None:
        """The next bytes of the text, at least one."""
        # Of the last byte up to here other than a backslash; before the window, as many backslashes as the one before ended with.
        at = np.arange(len(codes), dtype=np.int32)
        last_other = np.maximum.accumulate(
            np.where(codes == ord("\\"), np.int32(-1 - self._num_backslashes), at), dtype=np.int32
        )
        before = np.empty_like(last_other)
        before[0], before[1:] = -1 - self._num_backslashes, last_other[:-1]
        num_backslashes = at - 1 - before  # right before each byte
        is_quote = (codes == ord('"')) & (num_backslashes % 2 == 0)
        num_quotes = np.cumsum(is_quote, dtype=np.int32) + np.int32(self._num_quotes % 2)
        outside = num_quotes % 2 == 0
        steps = _STEPS[codes] * outside
        depths = np.cumsum(steps, dtype=np.int32)
        self.max_depth = max(self.max_depth, self._depth + int(depths.max()))
        self._depth += int(depths[-1])
        self.num_containers += int((steps > 0).sum())
        self.num_commas += int(((codes == ord(",")) & outside).sum())
        self._num_quotes = int(num_quotes[-1])
        self._num_backslashes = len(codes) - 1 - int(last_other[-1])
