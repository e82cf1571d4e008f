"""What a tokenizer's file provides: the pieces of its vocabulary, and encoding. The seam for other kinds of tokenizers.

SentencePiece is the one kind today (sentencepiece_model.py). Everything that follows from these few methods is in tokenizer.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PieceTable:
    """What each token adds to a text, indexed by token id. A control token has the surface "" and no byte."""

    names: tuple[str, ...]  # as the vocabulary lists them, such as "▁the", "<0xE2>" or "[INST]"
    surfaces: tuple[str, ...]  # the text, with ▁ as a space; "" for control tokens and bytes
    bytes: tuple[int | None, ...]  # the byte of a byte-fallback token
    starts_with_space: tuple[bool, ...]
    is_control: tuple[bool, ...]


class TokenizerModel(Protocol):
    """One vocabulary. `encode` and `encode_continuation` may run in a thread."""

    @property
    def bos_token_id(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    @property
    def pieces(self) -> PieceTable: ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text on its own, without control tokens. Raises RequestError for text that is not valid Unicode."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that directly follows other text. Raises RequestError as `encode` does."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all ids at once. Every id is within the vocabulary."""
        ...
