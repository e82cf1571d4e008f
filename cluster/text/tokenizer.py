"""Text to token ids: finds a checkpoint's SentencePiece model, and says which chat template belongs to it.

Knows file names, template versions and what each id decodes to on its own. Does not know conversations (chat.py) or how ids join
into text (detokenizer.py).

    file in the checkpoint        template
    tokenizer.model.v1/.v2/.v3    v1 / v2 / v3, by the suffix
    tokenizer.model               v3 with 32,768 pieces (Mistral v0.3), else v1 (v0.1 and v0.2 have 32,000)
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from sentencepiece import SentencePieceProcessor

from workers.errors import ConfigError, RequestError

log = logging.getLogger(__name__)

TemplateVersion = Literal["v1", "v2", "v3"]
TEMPLATE_VERSIONS: tuple[TemplateVersion, ...] = get_args(TemplateVersion)
_SPACE = "▁"
_ANCHOR = "☺"  # mistral-common's own choice for the same purpose
_V3_VOCAB_SIZE = 32_768
_VERSIONED = re.compile(r"\.model\.(v\d+)(m\d+)?$")


@dataclass(frozen=True, slots=True)
class PieceTable:
    """What each token id adds to a text, by id. A control token has surface "" and no byte."""

    surfaces: tuple[str, ...]  # with ▁ as a space; "" for control tokens and bytes
    bytes: tuple[int | None, ...]  # the byte of a byte-fallback token
    starts_with_space: tuple[bool, ...]
    is_control: tuple[bool, ...]


class Tokenizer:
    """One SentencePiece model. `encode` releases the interpreter lock, so it may run in a thread beside the event loop."""

    def __init__(self, path: Path, template_version: TemplateVersion) -> None:
        self.path = path
        self.template_version = template_version
        try:
            self.sp = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            raise ConfigError(f"{path} is not a SentencePiece model: {e}.") from e
        self.vocab_size: int = self.sp.vocab_size()
        self.bos_token_id: int = self.sp.bos_id()
        self.eos_token_id: int = self.sp.eos_id()
        if self.bos_token_id < 0 or self.eos_token_id < 0:
            raise ConfigError(f"{path} defines no beginning-of-sequence or no end-of-sequence token.")

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The prompt's token ids, with the beginning-of-sequence token unless bos=False. "" gives [bos]."""
        try:
            ids: list[int] = self.sp.encode(text)
        except RuntimeError as e:  # a lone surrogate: no UTF-8 exists for it
            raise RequestError(
                "The text is not valid Unicode: it holds half of a surrogate pair.", param="prompt"
            ) from e
        return [self.bos_token_id, *ids] if bos else ids

    def decode(self, token_ids: list[int]) -> str:
        """The whole text at once; ids beyond the vocabulary and control tokens add nothing."""
        return str(self.sp.decode([i for i in token_ids if 0 <= i < self.vocab_size]))

    @cached_property
    def pieces(self) -> PieceTable:
        sp, size = self.sp, self.vocab_size
        names = [sp.id_to_piece(i) for i in range(size)]
        control = [sp.is_control(i) for i in range(size)]
        byte = [int(names[i][3:5], 16) if sp.is_byte(i) else None for i in range(size)]
        surfaces = [
            "" if control[i] or byte[i] is not None else sp.decode([i]) if sp.is_unknown(i) else n.replace(_SPACE, " ")
            for i, n in enumerate(names)
        ]
        starts = [n.startswith(_SPACE) and not control[i] and not sp.is_unknown(i) for i, n in enumerate(names)]
        return PieceTable(tuple(surfaces), tuple(byte), tuple(starts), tuple(control))

    @cached_property
    def control_token_ids(self) -> frozenset[int]:
        return frozenset(i for i, control in enumerate(self.pieces.is_control) if control)

    @cached_property
    def max_piece_chars(self) -> int:
        """No token stands for more characters than this, so a text's length bounds its tokens from below."""
        return max(map(len, self.pieces.surfaces))

    @cached_property
    def tool_calls_token_id(self) -> int | None:
        """The control token behind which tool calls stand, in vocabularies that have it (v2 and v3)."""
        return self.control_token_id("[TOOL_CALLS]")

    def control_token_id(self, name: str) -> int | None:
        """The id of a control token, or None: a piece of that name that is plain text does not count."""
        token_id: int = self.sp.piece_to_id(name)
        return token_id if self.sp.is_control(token_id) else None

    def bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that would write these words, for SamplingParams.bad_words.

        Each word counts at a text's or word's start and, where its encoding differs there, right behind other text. Raises
        RequestError for a word that no token stands for.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            stripped = word.lstrip(" ")
            if not stripped:
                raise RequestError("'bad_words' has a word that is empty or blank; remove it.", param="bad_words")
            for ids in (self._encode_word(stripped), self.encode_continuation(stripped)):
                found[tuple(ids)] = None
        return tuple(found)

    def _encode_word(self, word: str) -> list[int]:
        try:
            return self.encode(word, bos=False)
        except RequestError as e:
            raise RequestError(str(e), param="bad_words") from e

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of text that stands right behind other text: without the space that SentencePiece puts before a first word."""
        return self.encode(_ANCHOR + text, bos=False)[self._num_anchor_ids :]

    @cached_property
    def _num_anchor_ids(self) -> int:
        return len(self.sp.encode(_ANCHOR))

    def token_text(self, token_id: int) -> str:
        """One token alone, as log-probabilities show it: `</s>` for control tokens, `<0xE2>` for a byte that is no character."""
        if not 0 <= token_id < self.vocab_size:
            return f"<|{token_id}|>"
        byte = self.pieces.bytes[token_id]
        if byte is not None:
            return chr(byte) if byte < 0x80 else f"<0x{byte:02X}>"
        return self.pieces.surfaces[token_id] or str(self.sp.id_to_piece(token_id))

    def token_bytes(self, token_id: int) -> list[int] | None:
        """The token's UTF-8 bytes, or None where it stands for no text."""
        if not 0 <= token_id < self.vocab_size or self.pieces.is_control[token_id]:
            return None
        byte = self.pieces.bytes[token_id]
        return list(self.pieces.surfaces[token_id].encode()) if byte is None else [byte]


def load_tokenizer(
    folder: str | Path, *, version: TemplateVersion | None = None, model_vocab_size: int | None = None
) -> Tokenizer:
    """Finds and loads the checkpoint's tokenizer; an explicit template version wins over the file's.

    Raises ConfigError when there is none this server can use, or when it has more tokens than the model.
    """
    folder = Path(folder)
    if version is not None and version not in TEMPLATE_VERSIONS:
        raise ConfigError(f"Chat template {version!r} is not known; use one of {', '.join(TEMPLATE_VERSIONS)}.")
    path = find_tokenizer(folder)
    named = _VERSIONED.search(path.name)
    tokenizer = Tokenizer(path, "v1")
    if version is not None:
        tokenizer.template_version = version
    elif named is not None:
        tokenizer.template_version = named[1]  # type: ignore[assignment]  # find_tokenizer offers only known versions
    elif tokenizer.vocab_size == _V3_VOCAB_SIZE:
        tokenizer.template_version = "v3"
    _ = tokenizer.max_piece_chars  # builds the piece table now, not during the first request
    log.info("tokenizer %s: %s pieces, chat template %s", path, tokenizer.vocab_size, tokenizer.template_version)
    if model_vocab_size is not None and tokenizer.vocab_size > model_vocab_size:
        raise ConfigError(
            f"The tokenizer {path.name} has {tokenizer.vocab_size} tokens but the model only {model_vocab_size}; "
            "they do not belong together."
        )
    return tokenizer


def find_tokenizer(folder: Path) -> Path:
    """The checkpoint's SentencePiece model. Raises ConfigError when there is none this server can use."""
    for name in ("tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    others = sorted(p.name for p in folder.glob("tokenizer.model.*")) + sorted(
        p.name for p in folder.glob("tekken*.json")
    )
    if others:
        raise ConfigError(
            f"{folder} has the tokenizer {others[0]}, which is not supported; "
            "Tramontane reads SentencePiece tokenizers of versions v1, v2 and v3."
        )
    raise ConfigError(f"{folder} has no tokenizer; expected tokenizer.model.v3, .v2, .v1 or tokenizer.model in it.")
