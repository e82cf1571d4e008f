"""Mistral's tekken vocabulary, read from a checkpoint's tekken.json by mistral-common: byte-level, with the control tokens first.

Knows the file through mistral-common's Tekkenizer, which encodes. Does not know chat templates or how a file is found.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from workers.errors import ConfigError, RequestError
from workers.tokenizer_files.pieces import AddedToken, PieceTable, SpecialIds, check_unicode, split_bytes


class TekkenModel:
    """A TokenizerModel. `encode` releases the interpreter lock. Raises ConfigError for a file that it cannot use.

    tekkenizer: mistral-common's own, for its chat templates. version: of those, "v3".
    """

    kind = "tekken"

    def __init__(self, path: Path) -> None:
        # Late: importing mistral-common takes most of a second.
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        try:
            self.tekkenizer: Any = Tekkenizer.from_file(path)
            bos, eos = self.tekkenizer.bos_id, self.tekkenizer.eos_id
        # mistral-common checks little of a file before it uses it, so a damaged one raises whatever its own code then raises.
        except Exception as e:
            reason = f"{type(e).__name__}: {str(e).split(chr(10), 1)[0][:200]}"
            raise ConfigError(
                f"{path} is not a tekken tokenizer ({reason}).", remedy="Download it again, or use another checkpoint."
            ) from e
        self.version: str = self.tekkenizer.version.value
        unk = "<unk>"
        self.special = SpecialIds(
            bos, eos, self.tekkenizer.get_special_token(unk) if self.tekkenizer.is_special(unk) else None, ends=(eos,)
        )

    @property
    def added_tokens(self) -> Mapping[str, AddedToken]:
        return {}

    @cached_property
    def pieces(self) -> PieceTable:
        tekken, size = self.tekkenizer, self.tekkenizer.n_words
        num_control = tekken.num_special_tokens
        control_names = [tekken.id_to_piece(i) for i in range(num_control)]
        parts = [split_bytes(tekken.id_to_byte_piece(i)) for i in range(num_control, size)]
        return PieceTable(
            names=(*control_names, *(surface if data is None else repr(data) for surface, data in parts)),
            surfaces=(*[""] * num_control, *(surface for surface, _ in parts)),
            partial=(*[None] * num_control, *(data for _, data in parts)),
            starts_with_space=(False,) * size,
            is_control=(True,) * num_control + (False,) * (size - num_control),
            byte_level=True,
        )

    def encode(self, text: str) -> list[int]:
        check_unicode(text)  # tiktoken would write a replacement character
        try:
            ids: list[int] = self.tekkenizer.encode(text, bos=False, eos=False)
        except ValueError as e:  # tiktoken's regular expression gives up after about a million spaces in a row
            raise RequestError(
                "The text has too many spaces in a row to be encoded.", remedy="Remove some.", param="prompt"
            ) from e
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text)
