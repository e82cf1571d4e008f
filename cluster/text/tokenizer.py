"""Text to token ids: how special tokens in a text are encoded, what stands around a prompt, and the text of each single token.

Works with any kind of vocabulary (workers/tokenizer_files). Does not know conversations (chat/), how ids become text in a stream
(output/detokenizer.py), or which file of a checkpoint is its tokenizer (tokenizer_file.py).
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.text.output.detokenizer import Detokenizer
from cluster.text.special_tokens import SpecialTokens
from cluster.text.tokenizer_file import TEMPLATE_VERSIONS, TemplateVersion, find_tokenizer, template_version
from cluster.text.tokenizer_settings import PrependScheme, TokenizerSettings, read_tokenizer_settings
from workers.errors import ConfigError, RequestError
from workers.tokenizer_files.opening import open_model
from workers.tokenizer_files.pieces import AddedToken, PieceTable, TokenizerModel
from workers.tokenizer_files.sentencepiece_model import SentencePieceModel
from workers.tokenizer_files.tekken_model import TekkenModel

log = logging.getLogger(__name__)


class Tokenizer:
    """One vocabulary, and the version of mistral-common's chat templates that it is used with; None: none of them fits the file.

    path: the file it was read from. settings: of the checkpoint's other files. Its added tokens beyond model_vocab_size are left out: the
    model cannot read them.
    """

    def __init__(
        self,
        model: TokenizerModel,
        *,
        path: Path,
        template_version: TemplateVersion | None,
        settings: TokenizerSettings | None = None,
        model_vocab_size: int | None = None,
    ) -> None:
        self.model = model
        self.path = path
        self.template_version = template_version
        self.settings = settings or TokenizerSettings()
        added = {
            content: token
            for content, token in self.settings.added_tokens.items()
            if model_vocab_size is None or token.id < model_vocab_size
        }
        self.pieces: PieceTable = model.pieces.with_added(added)
        self.vocab_size = len(self.pieces.names)
        control = {name: AddedToken(i) for name, i in self._control_token_ids_by_name.items()}
        # Elsewhere, a text names the unknown token only if that is an added token.
        unk, is_listed = model.special.unk, isinstance(model, SentencePieceModel)
        unknown = {self.pieces.names[unk]: AddedToken(unk)} if unk is not None and is_listed else {}
        self.special_tokens = SpecialTokens(unknown | control | added)
        self.bos_token_id = self._own_token("bos_token") if model.special.bos is None else model.special.bos
        self.eos_token_id = self._own_token("eos_token") if model.special.eos is None else model.special.eos
        self._prefix, self._suffix = self._around_prompts()

    @property
    def tekken(self) -> Any:
        """mistral-common's Tekkenizer, if the file is a tekken.json; else None."""
        return self.model.tekkenizer if isinstance(self.model, TekkenModel) else None

    @property
    def description(self) -> str:
        """For a reader: the kind and the file."""
        return f"{self.model.kind} ({self.path.name}, {self.vocab_size:,} tokens)"

    @property
    def adds_bos(self) -> bool:
        """Whether something is put before a prompt."""
        return bool(self._prefix)

    @property
    def adds_eos(self) -> bool:
        return bool(self._suffix)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a text in which nothing is a special token, after what the checkpoint puts before a prompt unless bos=False.

        "" gives [bos] in Mistral's models. May run in a thread while the event loop continues. Raises RequestError for text that is not
        valid Unicode.
        """
        ids = self.model.encode(text)
        return [*self._prefix, *ids] if bos else ids

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, in which special tokens may be written as text, as in transformers and vLLM.

        add_special_tokens: put around it what the checkpoint says, such as the beginning-of-sequence token, unless the text has it already.
        Runs and raises as `encode` does. Worked example: "<s>hi" and "hi" -> [1, 12014], "hi</s>" -> [1, 12014, 2].
        """
        ids, _ = self.encode_rendered(text)
        if not add_special_tokens:
            return ids
        if ids[: len(self._prefix)] != self._prefix:
            ids = [*self._prefix, *ids]
        if self._suffix and ids[-len(self._suffix) :] != self._suffix:
            ids += self._suffix
        return ids

    def _around_prompts(self) -> tuple[list[int], list[int]]:
        """What the tokenizer's file says, unless tokenizer_config.json says otherwise; else a beginning-of-sequence token."""
        said, settings = self.model.special, self.settings
        if said.prefix is not None and settings.adds_bos is None and settings.adds_eos is None:
            return list(said.prefix), list(said.suffix or ())
        adds_bos = settings.adds_bos is True if said.prefix is not None else settings.adds_bos is not False
        bos, eos = self._own_token("bos_token", self.bos_token_id), self._own_token("eos_token", self.eos_token_id)
        return [bos] if adds_bos and bos is not None else [], [eos] if settings.adds_eos and eos is not None else []

    def encode_rendered(self, text: str, *, mark: str = "") -> tuple[list[int], int]:
        """The ids of a text with special tokens, and how many of them at the end encode the text after the last special token.

        mark: removed from the text; see special_tokens.py.
        """
        ids: list[int] = []
        num_last = 0
        parts = self.special_tokens.split(text)
        for i in range(0, len(parts), 2):
            part = parts[i]
            if i and self.special_tokens[parts[i - 1]].rstrip:
                part = part.lstrip()
            following = self.special_tokens[parts[i + 1]] if i + 1 < len(parts) else None
            if following is not None and following.lstrip:
                part = part.rstrip()
            part = part.replace(mark, "") if mark else part
            encoded = self._encode_part(part, is_first=i == 0) if part else []
            ids += encoded
            num_last = len(encoded)
            if following is not None:
                ids.append(following.id)
        return ids, num_last

    def _encode_part(self, text: str, *, is_first: bool) -> list[int]:
        scheme = self.prepend_scheme
        if scheme == "always" and not (self.settings.keeps_own_space and text.startswith(" ")):
            return self.model.encode(text)
        # transformers adds no second space; mistral-common does.
        own_space = self.settings.prepend_scheme is not None and text.startswith(" ")
        if scheme == "first" and is_first and not own_space:
            return self.model.encode(text)
        return self.model.encode_continuation(text)

    @property
    def prepend_scheme(self) -> PrependScheme:
        """As the checkpoint says. Without a word from it, v1 is written with a space after </s>, v2 and v3 after [INST] without one."""
        return self.settings.prepend_scheme or ("always" if self.template_version in ("v1", None) else "first")

    def _own_token(self, key: str, default: int | None = None) -> int | None:
        """The id of the checkpoint's own token for this purpose."""
        content = self.settings.special_tokens.get(key, "")
        if content in self.special_tokens:
            return self.special_tokens[content].id
        return self.pieces.names.index(content) if content and content in self.pieces.names else default

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that directly follows other text: no space is added before its first word. Raises RequestError."""
        return self.model.encode_continuation(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all ids at once. Control tokens and ids beyond the vocabulary add nothing."""
        detokenizer = Detokenizer(self.pieces)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def shown_pieces(self, *, shows_special: bool) -> PieceTable:
        """What each token adds to a text in which special tokens are text too, or are not (`pieces`)."""
        return self._pieces_with_special if shows_special else self.pieces

    @cached_property
    def _pieces_with_special(self) -> PieceTable:
        return self.pieces.with_special_shown(self.model.special.unk)

    @cached_property
    def control_token_ids(self) -> frozenset[int]:
        return frozenset(i for i, control in enumerate(self.pieces.is_control) if control)

    @cached_property
    def max_piece_chars(self) -> int:
        """The most characters any token stands for, so a text's length gives a lower bound on its number of tokens."""
        longest = max(
            *map(len, self.pieces.surfaces), *(len(part) for part in self.pieces.partial if part is not None), 1
        )
        return max(self.special_tokens.max_chars, longest) * self.pieces.max_shrink

    @cached_property
    def tool_calls_token_id(self) -> int | None:
        """The control token that comes before tool calls; None in vocabularies without it (v1)."""
        return self.control_token_id("[TOOL_CALLS]")

    def control_token_id(self, name: str) -> int | None:
        """The id of a control token or of a special added token, or None. A plain text piece of that name does not count."""
        return self._control_token_ids_by_name.get(name)

    @cached_property
    def _control_token_ids_by_name(self) -> dict[str, int]:
        return {name: i for i in self.control_token_ids if (name := self.pieces.names[i])}

    def bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that would write these words, for SamplingParams.bad_words.

        Each word is encoded as it is at the start of a word and, if that differs, as it is directly after other text; a word may be a
        special token. Raises RequestError for an empty word.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            stripped = word.lstrip(" ")
            if not stripped:
                raise RequestError(
                    "'bad_words' contains an empty or blank word.", remedy="Remove it.", param="bad_words"
                )
            forms = [self._encode_word(stripped), self.encode_continuation(stripped)]
            if (
                self.pieces.byte_level
            ):  # a space before the word is a part of its first token, which no option of `encode` adds
                forms.append(self.encode_continuation(f" {stripped}"))
            found |= dict.fromkeys(map(tuple, forms))
        return tuple(found)

    def _encode_word(self, word: str) -> list[int]:
        try:
            return self.encode_prompt(word, add_special_tokens=False)
        except RequestError as e:
            raise RequestError(e.message, remedy=e.remedy, param="bad_words") from e

    def token_text(self, token_id: int) -> str:
        """A single token as log-probabilities show it: `</s>` for a control token, `<0xE2>` for a byte that is not ASCII.

        An id without a name shows as `<|32005|>`.
        """
        if not 0 <= token_id < self.vocab_size or not self.pieces.names[token_id]:
            return f"<|{token_id}|>"
        part = self.pieces.partial[token_id]
        return (self.pieces.surfaces[token_id] or self.pieces.names[token_id]) if part is None else _show_bytes(part)

    def token_bytes(self, token_id: int, *, shows_special: bool = False) -> list[int] | None:
        """The token's UTF-8 bytes, or None if it stands for no text."""
        pieces = self.shown_pieces(shows_special=shows_special)
        if not 0 <= token_id < self.vocab_size or pieces.is_control[token_id]:
            return None
        return list(pieces.bytes_of(token_id))


def _show_bytes(part: bytes) -> str:
    """b" \\xe2\\x80" -> " <0xE2><0x80>"."""
    text = part.decode(errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)


def load_tokenizer(
    folder: str | Path, *, version: TemplateVersion | None = None, model_vocab_size: int | None = None
) -> Tokenizer:
    """Finds and opens the checkpoint's tokenizer. An explicit template version takes precedence over the file's.

    folder: or a GGUF file. Raises ConfigError if there is no supported tokenizer, or if it has more tokens than the model.
    """
    if version is not None and version not in TEMPLATE_VERSIONS:
        raise ConfigError(
            f"Chat template {version!r} is not known.", remedy=f"Use one of {', '.join(TEMPLATE_VERSIONS)}."
        )
    path = find_tokenizer(Path(folder))
    settings = None if path.suffix == ".gguf" else read_tokenizer_settings(Path(folder))
    tokenizer = open_tokenizer(path, version, settings=settings, model_vocab_size=model_vocab_size)
    log.info("tokenizer %s: %s tokens, %s", path, tokenizer.vocab_size, tokenizer.model.kind)
    if model_vocab_size is not None:
        if tokenizer.vocab_size > model_vocab_size:
            raise ConfigError(
                f"The tokenizer {path.name} has {tokenizer.vocab_size} tokens, but the model has only {model_vocab_size}.",
                remedy="Use the tokenizer that belongs to the model.",
            )
        for content, token in tokenizer.settings.added_tokens.items():
            if token.id >= model_vocab_size:
                log.warning("The added token %r is plain text here: its id is beyond the model's.", content)
    return tokenizer


def open_tokenizer(
    path: Path,
    version: TemplateVersion | None = None,
    *,
    settings: TokenizerSettings | None = None,
    model_vocab_size: int | None = None,
) -> Tokenizer:
    """The tokenizer in that file, with the settings of its folder; by default those that the file itself has. Raises ConfigError.

    Without a version, the file's name and what it says decide.
    """
    # The model builds its table of pieces here, so that the first request does not have to.
    model = open_model(path)
    tekken_version = model.version if isinstance(model, TekkenModel) else None
    return Tokenizer(
        model,
        path=path,
        template_version=version
        or template_version(path, vocab_size=len(model.pieces.names), tekken_version=tekken_version),
        settings=settings or TokenizerSettings(added_tokens=dict(model.added_tokens)),
        model_vocab_size=model_vocab_size,
    )
