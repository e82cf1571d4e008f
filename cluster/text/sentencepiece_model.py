"""A SentencePiece vocabulary, read from a checkpoint's tokenizer.model. Does not know chat templates or how a file is found."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from cluster.text.tokenizer_model import PieceTable
from workers.errors import ConfigError, RequestError

_SPACE = "▁"
_ANCHOR = "☺"  # mistral-common uses the same one for this purpose


class SentencePieceModel:
    """A TokenizerModel. `encode` releases the interpreter lock. Raises ConfigError for a file it cannot use."""

    def __init__(self, path: Path) -> None:
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            raise ConfigError(
                f"{path} is not a SentencePiece model: {e}.", remedy="Download it again, or use another checkpoint."
            ) from e
        self.bos_token_id: int = self._processor.bos_id()
        self.eos_token_id: int = self._processor.eos_id()
        self.unk_token_id: int = self._processor.unk_id()
        if self.bos_token_id < 0 or self.eos_token_id < 0:
            raise ConfigError(
                f"{path} does not define both a beginning-of-sequence and an end-of-sequence token.",
                remedy="Use a checkpoint whose tokenizer defines both.",
            )

    @cached_property
    def pieces(self) -> PieceTable:
        processor, size = self._processor, self._processor.vocab_size()
        names = [str(processor.id_to_piece(i)) for i in range(size)]
        control = [processor.is_control(i) for i in range(size)]
        unknown = [processor.is_unknown(i) for i in range(size)]
        byte = [int(names[i][3:5], 16) if processor.is_byte(i) else None for i in range(size)]
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
        except RuntimeError as e:  # a lone surrogate, which has no UTF-8 form
            raise RequestError(
                "The text is not valid Unicode: it contains half of a surrogate pair.",
                remedy="Remove it.",
                param="prompt",
            ) from e
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Without the space that SentencePiece puts before the first word of a text."""
        return self.encode(_ANCHOR + text)[self._num_anchor_ids :]

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(token_ids)))

    @cached_property
    def _num_anchor_ids(self) -> int:
        return len(self._processor.encode(_ANCHOR))
