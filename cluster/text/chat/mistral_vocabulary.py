"""Any of our tokenizers as mistral-common's encoders need one, so that Mistral's templates work with a GGUF file or a tokenizer.json too.

Knows both interfaces; no template. What the encoders never ask for is answered plainly: they decode each prompt only for a text that nobody
reads here.
"""

from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, TokenizerVersion
from mistral_common.tokens.tokenizers.base import Tokenizer as MistralCommonTokenizer

from cluster.text.tokenizer import Tokenizer


class MistralVocabulary(MistralCommonTokenizer):
    """Encodes as ours does. bos, eos: the ids of <s> and </s>, whatever token ends the answers of a fine-tune."""

    model_settings_builder = None

    def __init__(self, tokenizer: Tokenizer, version: TokenizerVersion, *, bos: int, eos: int) -> None:
        self._tokenizer, self._version, self._bos, self._eos = tokenizer, version, bos, eos

    @property
    def version(self) -> TokenizerVersion:
        return self._version

    @property
    def file_path(self) -> Path:
        return self._tokenizer.path

    @property
    def n_words(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def special_ids(self) -> set[int]:
        return set(self._tokenizer.control_token_ids)

    @property
    def num_special_tokens(self) -> int:
        return len(self._tokenizer.control_token_ids)

    @property
    def bos_id(self) -> int:
        return self._bos

    @property
    def eos_id(self) -> int:
        return self._eos

    @property
    def pad_id(self) -> int:
        return -1

    @property
    def unk_id(self) -> int:
        unk = self._tokenizer.model.special.unk
        return -1 if unk is None else unk

    def vocab(self) -> list[str]:
        return list(self._tokenizer.pieces.names)

    def id_to_piece(self, token_id: int) -> str:
        return self._tokenizer.pieces.names[token_id]

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        ids = self._tokenizer.encode(s, bos=False)
        return [*([self._bos] if bos else []), *ids, *([self._eos] if eos else [])]

    def decode(self, tokens: list[int], special_token_policy: SpecialTokenPolicy = SpecialTokenPolicy.IGNORE) -> str:
        return ""

    def _to_string(self, tokens: list[int]) -> str:
        return ""

    def get_special_token(self, s: str) -> int:
        """As SentencePiece: the unknown token for one that the vocabulary lacks. The template checks those that it needs."""
        token_id = self._tokenizer.control_token_id(s)
        return self.unk_id if token_id is None else token_id

    def is_special(self, token: Any) -> bool:
        if isinstance(token, str):
            return self._tokenizer.control_token_id(token) is not None
        return int(token) in self._tokenizer.control_token_ids
