"""The tokenizer's part of a GGUF file's metadata: a small byte-level vocabulary, and any SentencePiece model's.

The byte-level one has each byte, and each beginning of a few words, so that the ways in which a text may be split show in its tokens.
"""

from functools import cache
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from workers.tokenizer_files.byte_level import CHAR_OF
from workers.tokenizer_files.gguf_model import TokenType

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN = "<tool_call>"  # user-defined
_WORDS = (
    *("hello", " hello", " world", "WORLD", " it", "it's", "'s", "'S", "123456", " 123", "   ", "\n\n", " \n", "\t\t"),
    *("==", " ==", "x=", "//", ".\n", "日本語", "één", " Één", "éÉn", "aB", "Ab", "½", "²2", "$5", " ("),
)


def byte_level_metadata(pre: str | None, **more: Any) -> dict[str, Any]:
    """more: under tokenizer.ggml, in addition."""
    tokens = [*SPECIAL, PLAIN, *CHAR_OF.values()]
    merges: dict[str, None] = {}
    for word in _WORDS:
        chars = [CHAR_OF[byte] for byte in word.encode()]
        for end in range(1, len(chars)):
            merges[f"{''.join(chars[:end])} {chars[end]}"] = None
    tokens += dict.fromkeys(merge.replace(" ", "") for merge in merges if merge.replace(" ", "") not in tokens)
    types = [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED] + [TokenType.NORMAL] * (len(tokens) - 4)
    fields = {"model": "gpt2", "tokens": tokens, "token_type": [int(t) for t in types], "merges": list(merges)}
    fields |= {"bos_token_id": 1, "eos_token_id": 0, "unknown_token_id": 0}
    fields |= {} if pre is None else {"pre": pre}
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | more).items()}


def sentencepiece_metadata(path: Path, **more: Any) -> dict[str, Any]:
    """more: under tokenizer.ggml, in addition."""
    return {**_sentencepiece_metadata(path), **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}


@cache
def _sentencepiece_metadata(path: Path) -> dict[str, Any]:
    model = SentencePieceProcessor(model_file=str(path))
    size = model.vocab_size()
    types = [
        TokenType.UNKNOWN
        if model.is_unknown(i)
        else TokenType.CONTROL
        if model.is_control(i)
        else TokenType.BYTE
        if model.is_byte(i)
        else TokenType.NORMAL
        for i in range(size)
    ]
    fields = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in range(size)],
        "scores": [model.get_score(i) for i in range(size)],
        "token_type": [int(t) for t in types],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
