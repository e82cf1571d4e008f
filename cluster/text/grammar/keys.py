"""Which keys a pattern of `patternProperties` allows, found by following llguidance's automaton byte by byte.

Knows patterns in llguidance's notation and their texts; no schemas. All work is bounded.
"""

import json

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask, get_bitmask_shape

from cluster.text.grammar.errors import GrammarError

_EOS = 256
_NUM_TOKENS = 257
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_MAX_STEPS = 2000  # of one pattern, each some 10 microseconds
_MAX_BYTES = 64  # of a key in JSON; with a longer one, the pattern is taken for one with too many keys


class KeyPatterns:
    """Answers about patterns. Stateless; may be used from several threads."""

    def __init__(self) -> None:
        self._bytes = LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=_EOS)

    def matches(self, pattern: str, key: str) -> bool:
        """Whether the pattern allows this key. Raises GrammarError for a pattern that cannot be used."""
        matcher = self._matcher(pattern)
        data = list(json.dumps(key, ensure_ascii=False).encode())
        return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())

    def finite(self, pattern: str, max_keys: int) -> list[str] | None:
        """All keys that the pattern allows, or None if there are more than `max_keys`, or more than can be found in bounded time."""
        matcher = self._matcher(pattern)
        mask = np.zeros(get_bitmask_shape(1, _NUM_TOKENS), dtype=np.int32)
        keys: set[str] = set()
        text = bytearray()
        # For each byte of `text` and the end: what may come next and was not tried yet.
        open_choices = [self._next(matcher, mask)]
        for _ in range(_MAX_STEPS):
            if not open_choices[-1]:
                open_choices.pop()
                if not open_choices:
                    return sorted(keys)
                text.pop()
                matcher.rollback(1)
                continue
            choice = open_choices[-1].pop()
            if choice == _EOS:
                keys.add(json.loads(text))
                if len(keys) > max_keys:
                    return None
                continue
            if len(text) == _MAX_BYTES:
                return None
            text.append(choice)
            matcher.consume_token(choice)
            open_choices.append(self._next(matcher, mask))
        return None

    def _next(self, matcher: LLMatcher, mask: np.ndarray) -> list[int]:
        if matcher.is_stopped():  # after the closing quote, or because of an error
            return [] if matcher.is_error() else [_EOS]
        fill_next_token_bitmask(matcher, mask)
        if matcher.is_error():
            return []
        return [int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:_NUM_TOKENS])]

    def _matcher(self, pattern: str) -> LLMatcher:
        schema = {"type": "string", "pattern": pattern, "x-guidance": {"whitespace_flexible": False}}
        matcher = LLMatcher(
            self._bytes, json.dumps({"grammars": [{"json_schema": schema}]}), log_level=0, limits=_LIMITS
        )
        if matcher.is_error() and "Regex is empty" not in matcher.get_error():
            reason = matcher.get_error().split("\n", 1)[0][:200].rstrip(".")
            raise GrammarError(f"a key pattern cannot be used: {reason}.", remedy="Simplify it.")
        return matcher


class _Bytes:
    """A vocabulary of all bytes, in the form that TokenizerWrapper reads."""

    def __init__(self) -> None:
        self.eos_token_id = _EOS
        self.bos_token_id = None
        self.tokens = [bytes((i,)) for i in range(_EOS)] + [b"<eos>"]
        self.special_token_ids = [_EOS]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())
