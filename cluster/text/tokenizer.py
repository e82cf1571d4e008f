"""Text to token ids: finds and opens a checkpoint's tokenizer, and says which chat template belongs to it.

Knows file names, template versions, how special tokens in a text are encoded, and the text of each single token. Does not know
conversations (chat/), how ids become text in a stream (output/detokenizer.py), or the format of the file (tokenizer_model.py).

    file in the checkpoint        template
    tokenizer.model.v1/.v2/.v3    v1 / v2 / v3, by the suffix
    tokenizer.model               v3 with 32,768 pieces (Mistral v0.3), otherwise v1 (v0.1 and v0.2 have 32,000)
"""

import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from cluster.text.output.detokenizer import Detokenizer
from cluster.text.sentencepiece_model import SentencePieceModel
from cluster.text.special_tokens import SpecialTokens
from cluster.text.tokenizer_model import PieceTable, TokenizerModel
from cluster.text.tokenizer_settings import AddedToken, PrependScheme, TokenizerSettings, read_tokenizer_settings
from workers.errors import ConfigError, RequestError

log = logging.getLogger(__name__)

TemplateVersion = Literal["v1", "v2", "v3"]
TEMPLATE_VERSIONS: tuple[TemplateVersion, ...] = get_args(TemplateVersion)
_V3_VOCAB_SIZE = 32_768
_VERSIONED = re.compile(r"\.model\.(v\d+)(m\d+)?$")


class Tokenizer:
    """One vocabulary, and the chat template version it is used with. `path` is the file it was read from.

    settings: of the checkpoint's other files. Its added tokens beyond model_vocab_size are left out: the model cannot read them.
    """

    def __init__(
        self,
        model: TokenizerModel,
        *,
        path: Path,
        template_version: TemplateVersion,
        settings: TokenizerSettings | None = None,
        model_vocab_size: int | None = None,
    ) -> None:
        self._model = model
        self.path = path
        self.template_version = template_version
        self.settings = settings or TokenizerSettings()
        self.bos_token_id = model.bos_token_id
        self.eos_token_id = model.eos_token_id
        added = {
            content: token
            for content, token in self.settings.added_tokens.items()
            if model_vocab_size is None or token.id < model_vocab_size
        }
        self.pieces: PieceTable = model.pieces.with_added(added)
        self.vocab_size = len(self.pieces.names)
        self._model_decodes = self.pieces.surfaces == model.pieces.surfaces
        control = {name: AddedToken(i) for name, i in self._control_token_ids_by_name.items()}
        unknown = {name: AddedToken(model.unk_token_id) for name in (self.pieces.names[model.unk_token_id],)}
        self.special_tokens = SpecialTokens(unknown | control | added)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a text in which nothing is a special token, with the beginning-of-sequence token unless bos=False.

        "" gives [bos]. May run in a thread while the event loop continues. Raises RequestError for text that is not valid Unicode.
        """
        ids = self._model.encode(text)
        return [self.bos_token_id, *ids] if bos else ids

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, in which special tokens may be written as text, as in transformers and vLLM.

        add_special_tokens: start with the beginning-of-sequence token, unless the text already does or the checkpoint says otherwise.
        Runs and raises as `encode` does. Worked example: "<s>hi" and "hi" -> [1, 12014], "hi</s>" -> [1, 12014, 2].
        """
        ids, _ = self.encode_rendered(text)
        if not add_special_tokens:
            return ids
        bos, eos = self._token_named("bos_token", self.bos_token_id), self._token_named("eos_token", self.eos_token_id)
        if self.settings.adds_bos and ids[:1] != [bos]:
            ids.insert(0, bos)
        if self.settings.adds_eos and ids[-1:] != [eos]:
            ids.append(eos)
        return ids

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
        if scheme == "always":
            return self._model.encode(text)
        # transformers adds no second space; mistral-common does.
        own_space = self.settings.prepend_scheme is not None and text.startswith(" ")
        if scheme == "first" and is_first and not own_space:
            return self._model.encode(text)
        return self._model.encode_continuation(text)

    @property
    def prepend_scheme(self) -> PrependScheme:
        """As the checkpoint says. Without a word from it, v1 is written with a space after </s>, v2 and v3 after [INST] without one."""
        return self.settings.prepend_scheme or ("always" if self.template_version == "v1" else "first")

    def _token_named(self, key: str, default: int) -> int:
        """The id of the checkpoint's own token for this purpose."""
        content = self.settings.special_tokens.get(key, "")
        return self.special_tokens[content].id if content in self.special_tokens else default

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that directly follows other text: no space is added before its first word. Raises RequestError."""
        return self._model.encode_continuation(text)

    def decode(self, token_ids: list[int]) -> str:
        """The text of all ids at once. Control tokens and ids beyond the vocabulary add nothing."""
        if self._model_decodes:
            return self._model.decode([i for i in token_ids if 0 <= i < self.vocab_size])
        detokenizer = Detokenizer(self.pieces)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def shown_pieces(self, *, shows_special: bool) -> PieceTable:
        """What each token adds to a text in which special tokens are text too, or are not (`pieces`)."""
        return self._pieces_with_special if shows_special else self.pieces

    @cached_property
    def _pieces_with_special(self) -> PieceTable:
        return self.pieces.with_special_shown(self._model.unk_token_id)

    @cached_property
    def control_token_ids(self) -> frozenset[int]:
        return frozenset(i for i, control in enumerate(self.pieces.is_control) if control)

    @cached_property
    def max_piece_chars(self) -> int:
        """The most characters any token stands for, so a text's length gives a lower bound on its number of tokens."""
        return max(self.special_tokens.max_chars, *map(len, self.pieces.surfaces))

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
            for ids in (self._encode_word(stripped), self.encode_continuation(stripped)):
                found[tuple(ids)] = None
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
        byte = self.pieces.bytes[token_id]
        if byte is not None:
            return chr(byte) if byte < 0x80 else f"<0x{byte:02X}>"
        return self.pieces.surfaces[token_id] or self.pieces.names[token_id]

    def token_bytes(self, token_id: int, *, shows_special: bool = False) -> list[int] | None:
        """The token's UTF-8 bytes, or None if it stands for no text."""
        pieces = self.shown_pieces(shows_special=shows_special)
        if not 0 <= token_id < self.vocab_size or pieces.is_control[token_id]:
            return None
        byte = pieces.bytes[token_id]
        return list(pieces.surfaces[token_id].encode()) if byte is None else [byte]


def load_tokenizer(
    folder: str | Path, *, version: TemplateVersion | None = None, model_vocab_size: int | None = None
) -> Tokenizer:
    """Finds and opens the checkpoint's tokenizer. An explicit template version takes precedence over the file's.

    Raises ConfigError if there is no supported tokenizer, or if it has more tokens than the model.
    """
    if version is not None and version not in TEMPLATE_VERSIONS:
        raise ConfigError(
            f"Chat template {version!r} is not known.", remedy=f"Use one of {', '.join(TEMPLATE_VERSIONS)}."
        )
    path = find_tokenizer(Path(folder))
    settings = read_tokenizer_settings(Path(folder))
    tokenizer = open_tokenizer(path, version, settings=settings, model_vocab_size=model_vocab_size)
    log.info("tokenizer %s: %s pieces, chat template %s", path, tokenizer.vocab_size, tokenizer.template_version)
    if model_vocab_size is not None:
        if tokenizer.vocab_size > model_vocab_size:
            raise ConfigError(
                f"The tokenizer {path.name} has {tokenizer.vocab_size} tokens, but the model has only {model_vocab_size}.",
                remedy="Use the tokenizer that belongs to the model.",
            )
        for content, token in settings.added_tokens.items():
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
    """The tokenizer in that file, with the settings of its folder. Raises ConfigError.

    Without a version, the file's name and size decide.
    """
    # The model builds its table of pieces here, so that the first request does not have to.
    model = SentencePieceModel(path)
    return Tokenizer(
        model,
        path=path,
        template_version=version or _guess_version(path, len(model.pieces.names)),
        settings=settings,
        model_vocab_size=model_vocab_size,
    )


def _guess_version(path: Path, vocab_size: int) -> TemplateVersion:
    named = _VERSIONED.search(path.name)
    version = next((v for v in TEMPLATE_VERSIONS if named is not None and v == named[1]), None)
    return version or ("v3" if vocab_size == _V3_VOCAB_SIZE else "v1")


def find_tokenizer(folder: Path) -> Path:
    """The path of the checkpoint's tokenizer. Raises ConfigError if there is none that is supported."""
    for name in ("tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    others = [
        p.name for glob in ("tokenizer.model.*", "tekken*.json", "tokenizer.json") for p in sorted(folder.glob(glob))
    ]
    if others:
        raise ConfigError(
            f"{folder} has the tokenizer {others[0]}, which is not supported.",
            remedy="Use a checkpoint with a SentencePiece tokenizer (tokenizer.model) of version v1, v2 or v3.",
        )
    raise ConfigError(
        f"{folder} has no tokenizer.",
        remedy="Add tokenizer.model.v3, .v2, .v1 or tokenizer.model to the folder.",
    )
