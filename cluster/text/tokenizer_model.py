"""What a tokenizer's file provides: the pieces of its vocabulary, and encoding. The seam for other kinds of tokenizers.

SentencePiece is the one kind today (sentencepiece_model.py). Everything that follows from these few methods is in tokenizer.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.text.tokenizer_settings import AddedToken


@dataclass(frozen=True, slots=True)
class PieceTable:
    """What each token adds to a text, indexed by token id. A control token has the surface "" and no byte."""

    names: tuple[str, ...]  # as the vocabulary lists them, such as "▁the", "<0xE2>" or "[INST]"
    surfaces: tuple[str, ...]  # the text, with ▁ as a space; "" for control tokens and bytes
    bytes: tuple[int | None, ...]  # the byte of a byte-fallback token
    starts_with_space: tuple[bool, ...]
    is_control: tuple[bool, ...]

    def with_added(self, added: Mapping[str, AddedToken]) -> "PieceTable":
        """The table with a checkpoint's added tokens. A special one is a control token, any other one shows as what it is called.

        A control token of the vocabulary stays one whatever the checkpoint says. An id between two tokens that nothing names is a control
        token with the name "".
        """
        size = max((token.id + 1 for token in added.values()), default=0)
        padding = max(size - len(self.names), 0)
        names, surfaces = [*self.names, *[""] * padding], [*self.surfaces, *[""] * padding]
        byte_values, control = [*self.bytes, *[None] * padding], [*self.is_control, *[True] * padding]
        starts = [*self.starts_with_space, *[False] * padding]
        for content, token in added.items():
            in_vocabulary = token.id < len(self.names)
            names[token.id] = content
            if token.special or (in_vocabulary and self.is_control[token.id]):
                surfaces[token.id], byte_values[token.id] = "", None
                starts[token.id], control[token.id] = False, True
            elif not in_vocabulary:
                surfaces[token.id], control[token.id] = content, False
        return PieceTable(tuple(names), tuple(surfaces), tuple(byte_values), tuple(starts), tuple(control))

    def with_special_shown(self, unk_token_id: int) -> "PieceTable":
        """The table in which control tokens and the unknown token show as what they are called. Ids without a name still show nothing."""
        shown = [bool(name) and (self.is_control[i] or i == unk_token_id) for i, name in enumerate(self.names)]
        surfaces = [name if shown[i] else self.surfaces[i] for i, name in enumerate(self.names)]
        control = [self.is_control[i] and not shown[i] for i in range(len(shown))]
        return replace(self, surfaces=tuple(surfaces), is_control=tuple(control))

    def opens_text(self, token_ids: Iterable[int]) -> bool:
        """Whether these ids have no text, so that the next token opens it and loses its leading space."""
        size = len(self.is_control)
        return all(not 0 <= i < size or self.is_control[i] for i in token_ids)


class TokenizerModel(Protocol):
    """One vocabulary. `encode` and `encode_continuation` may run in a thread."""

    @property
    def bos_token_id(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    @property
    def unk_token_id(self) -> int: ...

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
