"""A SentencePiece vocabulary, read from a checkpoint's tokenizer.model. Does not know chat templates or how a file is found."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from workers.errors import ConfigError
from workers.tokenizer_files.pieces import AddedToken, PieceTable, SpecialIds, invalid_unicode

_SPACE = "▁"
_ANCHOR = "☺"  # mistral-common uses the same one for this purpose


class SentencePieceModel:
    """A TokenizerModel. `encode` releases the interpreter lock. Raises ConfigError for what it cannot use.

    source: a file, or the bytes of one, which then is called `name`. special, added_tokens: what is said elsewhere about the bytes.
    """

    kind = "SentencePiece"

    def __init__(
        self,
        source: Path | bytes,
        *,
        name: str = "",
        special: SpecialIds | None = None,
        added_tokens: Mapping[str, AddedToken] | None = None,
    ) -> None:
        self._name = name = str(source) if isinstance(source, Path) else name
        given = {"model_file": str(source)} if isinstance(source, Path) else {"model_proto": source}
        try:
            self._processor = SentencePieceProcessor(**given)
        except (OSError, RuntimeError) as e:
            raise ConfigError(
                f"{name} is not a SentencePiece model: {str(e).rstrip('.')}.",
                remedy="Download it again, or use another checkpoint.",
            ) from e
        self.added_tokens: Mapping[str, AddedToken] = added_tokens or {}
        if special is not None:
            self.special = special
            return
        bos, eos, unk = self._processor.bos_id(), self._processor.eos_id(), self._processor.unk_id()
        if bos < 0 or eos < 0:
            raise ConfigError(
                f"{name} does not define both a beginning-of-sequence and an end-of-sequence token.",
                remedy="Use a checkpoint whose tokenizer defines both.",
            )
        self.special = SpecialIds(bos, eos, unk, ends=(eos,))

    @cached_property
    def pieces(self) -> PieceTable:
        processor, size = self._processor, self._processor.vocab_size()
        try:
            names = [str(processor.id_to_piece(i)) for i in range(size)]
        except UnicodeDecodeError as e:
            raise ConfigError(f"{self._name} has a piece that is not valid text.", remedy="Download it again.") from e
        control = [processor.is_control(i) for i in range(size)]
        unknown = [processor.is_unknown(i) for i in range(size)]
        byte = [bytes((int(names[i][3:5], 16),)) if processor.is_byte(i) else None for i in range(size)]
        surfaces = [
            ""
            if control[i] or byte[i] is not None
            else processor.decode([i])
            if unknown[i]
            else name.replace(_SPACE, " ")
            for i, name in enumerate(names)
        ]
        starts = [name.startswith(_SPACE) and not control[i] and not unknown[i] for i, name in enumerate(names)]
        return PieceTable(tuple(names), tuple(surfaces), tuple(byte), tuple(starts), tuple(control))

    def encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._processor.encode(text)
        except RuntimeError as e:  # a lone surrogate
            raise invalid_unicode() from e
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Without the space that SentencePiece puts before the first word of a text."""
        return self.encode(_ANCHOR + text)[self._num_anchor_ids :]

    @cached_property
    def _num_anchor_ids(self) -> int:
        return len(self._processor.encode(_ANCHOR))
