"""Prompts of a planned length: token ids where the server takes them, otherwise text of common words.

Knows which ids are ordinary tokens of the server's model, or how many tokens a word is there; has no tokenizer of its own.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cluster.bench.workload import Part, Planned

_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand part place
case week company system program question work government number night point home water room mother area money story fact
month lot right study book eye job word business issue side kind head house service friend father power hour game line end
member law car city community name president team minute idea kid body information back parent face others level office door
health person art war history party result change morning reason research girl guy moment air teacher force education open
return print value list index file path read write count total length class self def import from while true false none
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Prompts:
    """token_ids: ordinary tokens to draw from; None for text. tokens_per_word and num_extra (of a chat template) are measured."""

    token_ids: tuple[int, ...] | None
    tokens_per_word: float = 1.0
    num_extra: int = 0

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.asarray(self.token_ids)

    def make(self, planned: Planned) -> "list[int] | str":
        if self.token_ids is not None:
            ids = self._ids
            drawn = [ids[_draw(part, len(ids), part.num_tokens)] for part in planned.parts]
            return [int(i) for i in np.concatenate(drawn)]
        words: list[str] = []
        num_extra = self.num_extra
        for part in reversed(planned.parts):
            # The template's own tokens take the place of some of the last part.
            num_tokens = max(1, part.num_tokens - num_extra)
            num_extra = 0
            num = max(1, round(num_tokens / self.tokens_per_word))
            words[:0] = [WORDS[i] for i in _draw(part, len(WORDS), num)]
        return " ".join(words)


def _draw(part: Part, num_choices: int, num: int) -> np.ndarray:
    return np.random.default_rng(part.seed).integers(num_choices, size=num)
