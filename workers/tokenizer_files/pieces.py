"""What any tokenizer's file provides: the pieces of its vocabulary, and encoding. The seam between the kinds of files.

Gateway and engine read the same file through it, so both know the same bytes for each token. Knows no file format and no conversation.
What follows from these few members, such as special tokens in a text, is in cluster/text/tokenizer.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from workers.errors import RequestError


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A string that is one token. special: it is not part of the output's text. lstrip, rstrip: drop white space before, after it.

    single_word: it is a token only where no letter, digit or underscore touches it.
    """

    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class PieceTable:
    """What each token adds to a text, indexed by token id. A control token has the surface "" and no bytes.

    byte_level: the vocabulary is one of bytes, so that a token may hold any part of a character; else a character that has no token of its
    own is written with one token for each of its bytes. control_joins: bytes before and after a control token may form a character.
    max_shrink: so many characters of a text may become one before it is encoded.
    """

    names: tuple[str, ...]  # as the vocabulary lists them, such as "▁the", "Ġthe", "<0xE2>" or "[INST]"
    surfaces: tuple[str, ...]  # the text; "" for control tokens and partial ones
    # The bytes of tokens that are not whole characters, such as the byte-fallback tokens.
    partial: tuple[bytes | None, ...]
    starts_with_space: tuple[bool, ...]  # a space that is dropped at the start of a text
    is_control: tuple[bool, ...]
    byte_level: bool = False
    control_joins: bool = False
    max_shrink: int = 1

    def with_added(self, added: Mapping[str, AddedToken]) -> "PieceTable":
        """The table with a checkpoint's added tokens. A special one is a control token, any other one shows as what it is called.

        A control token of the vocabulary stays one whatever the checkpoint says. An id between two tokens that nothing names is a control
        token with the name "".
        """
        size = max((token.id + 1 for token in added.values()), default=0)
        padding = max(size - len(self.names), 0)
        names, surfaces = [*self.names, *[""] * padding], [*self.surfaces, *[""] * padding]
        partial, control = [*self.partial, *[None] * padding], [*self.is_control, *[True] * padding]
        starts = [*self.starts_with_space, *[False] * padding]
        for content, token in added.items():
            in_vocabulary = token.id < len(self.names) and bool(self.names[token.id])
            names[token.id] = content
            if token.special or (in_vocabulary and self.is_control[token.id]):
                surfaces[token.id], partial[token.id] = "", None
                starts[token.id], control[token.id] = False, True
            elif not in_vocabulary:
                surfaces[token.id], control[token.id] = content, False
        return replace(
            self,
            names=tuple(names),
            surfaces=tuple(surfaces),
            partial=tuple(partial),
            starts_with_space=tuple(starts),
            is_control=tuple(control),
        )

    def with_special_shown(self, unk_token_id: int | None) -> "PieceTable":
        """The table in which control tokens and the unknown token show as what they are called. Ids without a name still show nothing."""
        shown = [bool(name) and (self.is_control[i] or i == unk_token_id) for i, name in enumerate(self.names)]
        surfaces = [name if shown[i] else self.surfaces[i] for i, name in enumerate(self.names)]
        control = [self.is_control[i] and not shown[i] for i in range(len(shown))]
        return replace(self, surfaces=tuple(surfaces), is_control=tuple(control))

    def opens_text(self, token_ids: Iterable[int]) -> bool:
        """Whether these ids have no text, so that the next token opens it and loses its leading space."""
        size = len(self.is_control)
        return all(not 0 <= i < size or self.is_control[i] for i in token_ids)

    def bytes_of(self, token_id: int) -> bytes:
        """All that a token adds to a text; b"" for a control token."""
        part = self.partial[token_id]
        return self.surfaces[token_id].encode() if part is None else part


class TokenizerModel(Protocol):
    """One vocabulary. `encode` and `encode_continuation` may run in a thread; long texts leave the interpreter to other threads."""

    @property
    def kind(self) -> str:
        """For a reader: what holds the vocabulary, such as "SentencePiece"."""
        ...

    @property
    def special(self) -> "SpecialIds":
        """The ids that the file gives a purpose."""
        ...

    @property
    def added_tokens(self) -> Mapping[str, AddedToken]:
        """The strings that the file itself lists as tokens besides its vocabulary, or as special ones of it."""
        ...

    @property
    def pieces(self) -> PieceTable:
        """Without the added tokens: a model may lack some of those."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text on its own, in which nothing is a control token. Raises RequestError for text that is not valid Unicode."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that directly follows other text. Raises RequestError as `encode` does."""
        ...


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """None: the file does not say, or has none. ends: all that end an answer. prefix, suffix: what the file puts around a prompt, if it
    says; None: it leaves that to others.
    """

    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    ends: tuple[int, ...] = ()
    prefix: tuple[int, ...] | None = None
    suffix: tuple[int, ...] | None = None


def invalid_unicode() -> RequestError:
    """For a text with a lone surrogate, which has no UTF-8 form."""
    return RequestError(
        "The text is not valid Unicode: it contains half of a surrogate pair.", remedy="Remove it.", param="prompt"
    )


def check_unicode(text: str) -> None:
    """Raises RequestError for a text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise invalid_unicode() from e


def split_bytes(data: bytes) -> tuple[str, bytes | None]:
    """A byte-level token's surface and bytes: b"the" -> ("the", None), b"\\xe2\\x80" -> ("", b"\\xe2\\x80")."""
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        return "", data
