"""The tokenizer in a GGUF file's metadata: byte-level BPE ("gpt2", of Llama 3, SmolLM2, Nemo) or a SentencePiece vocabulary ("llama").

Knows the keys under tokenizer.ggml and what llama.cpp makes of them, whose ids it gives. Each becomes a model of another kind: BPE one in
Hugging Face's format, the other one a SentencePiece model. Does not read files (checkpoint/gguf/gguf_file.py) and knows no chat templates.
"""

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from workers.errors import ConfigError
from workers.tokenizer_files.gguf_splits import SPLITS, Splits
from workers.tokenizer_files.pieces import AddedToken, SpecialIds, TokenizerModel
from workers.tokenizer_files.sentencepiece_model import SentencePieceModel
from workers.tokenizer_files.sentencepiece_proto import sentencepiece_proto
from workers.tokenizer_files.tokenizer_json import TokenizerJsonModel

_KEY = "tokenizer.ggml."
# Tokens of this name end an answer in any file that has them: many files name only the token that ends a document.
_END_NAMES = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "<EOT>"}
)
_DEFAULT_SPECIAL: dict[str, dict[str, int | None]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gpt2": {"bos": 11, "eos": 11, "unknown": None},
}


class TokenType(IntEnum):
    """As GGUF and SentencePiece number them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_CONTROL_IF_UNKNOWN = {TokenType.UNKNOWN: TokenType.CONTROL}


def gguf_model(metadata: Mapping[str, Any], *, name: str) -> TokenizerModel:
    """name: of the file, for errors. Raises ConfigError for a tokenizer that does not run here, which it names."""
    kind = metadata.get(f"{_KEY}model")
    if not isinstance(kind, str) or kind not in _DEFAULT_SPECIAL:
        what = f"the tokenizer {kind!r}" if kind is not None else "no tokenizer"
        raise ConfigError(
            f"{name} has {what}, which is not supported.",
            remedy="Use a GGUF file with a tokenizer of the kind gpt2 or llama.",
        )
    tokens = _list(metadata, "tokens", name)
    if not all(isinstance(token, str) for token in tokens):
        raise ConfigError(f"{name} lists a token that is not text.", remedy="Download it again.")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    types = [_type(t) for t in _list(metadata, "token_type", name, default=[TokenType.NORMAL] * len(tokens))]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ConfigError(f"{name} lists a token twice or without a type.", remedy="Download it again.")
    types = [TokenType.CONTROL if token in _END_NAMES else kind for token, kind in zip(tokens, types, strict=True)]
    splits = _splits(metadata, name) if kind == "gpt2" else None
    special = _special_ids(metadata, tokens, adds_bos=splits.adds_bos if splits is not None else True)
    if splits is None:
        return _sentencepiece(metadata, tokens, types, special, name=name)
    merges = _list(metadata, "merges", name)
    if not all(isinstance(merge, str) for merge in merges):
        raise ConfigError(f"{name} lists a merge that is not text.", remedy="Download it again.")
    spec = _tokenizer_json(tokens, types, merges, splits)
    return TokenizerJsonModel(spec, name=name, special=special)


def _splits(metadata: Mapping[str, Any], name: str) -> Splits:
    pre = metadata.get(f"{_KEY}pre", "default")
    if not isinstance(pre, str) or pre not in SPLITS:
        raise ConfigError(
            f"{name} splits words as {pre!r} (tokenizer.ggml.pre), which is not known here.",
            remedy=f"Use a file with one of {', '.join(sorted(SPLITS))}.",
        )
    return SPLITS[pre]


def _special_ids(metadata: Mapping[str, Any], tokens: Sequence[str], *, adds_bos: bool) -> SpecialIds:
    defaults: Mapping[str, int | None] = _DEFAULT_SPECIAL[metadata[f"{_KEY}model"]]

    def named(key: str) -> int | None:
        token_id = metadata.get(f"{_KEY}{key}_token_id", defaults.get(key))
        return token_id if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None

    bos, eos = named("bos"), named("eos")
    ends = [eos, named("eot"), named("eom"), *(i for i, token in enumerate(tokens) if token in _END_NAMES)]
    adds_bos = metadata.get(f"{_KEY}add_bos_token", adds_bos)
    adds_eos = metadata.get(f"{_KEY}add_eos_token", False)
    return SpecialIds(
        bos=bos,
        eos=eos,
        unk=named("unknown"),
        ends=tuple(dict.fromkeys(i for i in ends if i is not None)),
        prefix=(bos,) if adds_bos and bos is not None else (),
        suffix=(eos,) if adds_eos and eos is not None else (),
    )


def _tokenizer_json(
    tokens: Sequence[str], types: Sequence[TokenType], merges: Sequence[str], splits: Splits
) -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(tokens)}
    # A space may be part of the first piece only in name: pieces write it as Ġ, and what follows the first space is the second piece.
    pairs = [(merge[: at + 1], merge[at + 2 :]) for merge in merges if (at := merge.find(" ", 1) - 1) >= 0]
    added = [
        {"id": i, "content": token, "special": types[i] is not TokenType.USER_DEFINED}
        for i, token in enumerate(tokens)
        if types[i] in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    ]
    steps = [
        {"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in splits.regexes
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [[a, b] for a, b in pairs if a in vocab and b in vocab and a + b in vocab],
            "unk_token": None,
            "ignore_merges": splits.ignores_merges,
        },
    }


def _sentencepiece(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[TokenType],
    special: SpecialIds,
    *,
    name: str,
) -> SentencePieceModel:
    scores = _list(metadata, "scores", name, default=[0.0] * len(tokens))
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise ConfigError(f"{name} has a score of a token that is not a finite number.", remedy="Download it again.")
    if len(scores) != len(tokens):
        raise ConfigError(f"{name} has {len(scores)} scores for {len(tokens)} tokens.", remedy="Download it again.")
    unk = 0 if special.unk is None else special.unk
    # SentencePiece knows one unknown token.
    types = [TokenType.UNKNOWN if i == unk else _CONTROL_IF_UNKNOWN.get(kind, kind) for i, kind in enumerate(types)]
    proto = sentencepiece_proto(
        list(zip(tokens, scores, types, strict=True)),
        unk_id=unk,
        has_bytes=TokenType.BYTE in types,
        adds_first_space=metadata.get(f"{_KEY}add_space_prefix", True) is not False,
    )
    added = {
        token: AddedToken(i, special=types[i] is not TokenType.USER_DEFINED)
        for i, token in enumerate(tokens)
        if types[i] in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }
    return SentencePieceModel(proto, name=name, special=special, added_tokens=added)


def _list(metadata: Mapping[str, Any], key: str, name: str, *, default: list[Any] | None = None) -> list[Any]:
    value = metadata.get(f"{_KEY}{key}", default)
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name} has no {_KEY}{key}.", remedy="Use a complete GGUF file.")
    return value


def _type(number: Any) -> TokenType:
    return TokenType(number) if number in TokenType.__members__.values() else TokenType.NORMAL
