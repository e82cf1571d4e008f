"""A vocabulary in Hugging Face's format, a checkpoint's tokenizer.json, or one made in that format (gguf_model.py).

Knows the parts of the format that say what a token adds to a text, and edits a copy of it so that no text becomes a special token: where
those stand in a prompt is decided in cluster/text/tokenizer.py. The package `tokenizers` encodes. BPE with bytes as characters (Llama 3,
SmolLM2) or with ▁ as a space (Llama 2), and unigram, which is SentencePiece's other model.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from workers.errors import ConfigError
from workers.tokenizer_files.byte_level import to_bytes
from workers.tokenizer_files.pieces import AddedToken, PieceTable, SpecialIds, check_unicode, split_bytes

_REMEDY = "Use a checkpoint whose tokenizer.json is byte-level BPE, or BPE or unigram with ▁ as a space, or that has a tokenizer.model."
_MAX_TOKENS = 1 << 24
# How many characters of a text a normalizer makes one of, at most. Unicode composes four at most; the others may remove any number.
_ANY = 1_000_000
_SHRINKING = {"Prepend": 1, "Lowercase": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
_PREPENDING: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
}


class TokenizerJsonModel:
    """A TokenizerModel. `encode` releases the interpreter lock. Raises ConfigError for what it cannot use.

    spec: the file's object. name: what errors call it. special: the ids that come from elsewhere; by default what `spec` says.
    """

    def __init__(self, spec: Mapping[str, Any], *, name: str, special: SpecialIds | None = None) -> None:
        try:
            model = spec["model"]
            self.kind: str = model.get("type") or ("BPE" if "merges" in model else "Unigram")
            if self.kind not in ("BPE", "Unigram"):
                raise ConfigError(f"{name} has a {self.kind} model, which is not supported.", remedy=_REMEDY)
            # The package cuts a merge at the length of a prefix, even within a character, which ends the process.
            if cut := next((f for f in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(f)), None):
                raise ConfigError(f"{name} has {cut}, which is not supported.", remedy=_REMEDY)
            self._vocab = _vocabulary(model)
            self.added_tokens = read_added_tokens(spec)
            _check_ids([*self._vocab.values(), *(token.id for token in self.added_tokens.values())])
            self._decoding = _read_decoding(spec, name)
            self.special = special or _special_ids(spec)
            self._max_shrink = max(
                (_shrinks(step) for step in steps_of(spec.get("normalizer"), "normalizers")),
                default=1,
            )
            plain = _without_special_tokens(spec, self.added_tokens)
            self._tokenizer = Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))
            continuing = _without_first_space(plain)
            self._continuing = (
                self._tokenizer
                if continuing == plain
                else Tokenizer.from_str(json.dumps(continuing, ensure_ascii=False))
            )
        except ConfigError:
            raise
        # A panic of the package is not an Exception; the package raises Exception itself for a file that it cannot read.
        except Exception as e:
            reason = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
            raise ConfigError(
                f"{name} is not a tokenizer in Hugging Face's format ({reason}).",
                remedy="Download it again, or use another checkpoint.",
            ) from e

    @cached_property
    def pieces(self) -> PieceTable:
        decoding, size = self._decoding, max(self._vocab.values(), default=-1) + 1
        names, surfaces = [""] * size, [""] * size
        partial: list[bytes | None] = [None] * size
        starts, control = [False] * size, [True] * size
        for name, i in self._vocab.items():
            names[i], control[i] = name, False
            if decoding.byte_level:
                surfaces[i], partial[i] = split_bytes(to_bytes(name))
            elif decoding.byte_fallback and (byte := _fallback_byte(name)) is not None:
                partial[i] = byte
            else:
                surfaces[i] = name.replace(decoding.space, " ")
                starts[i] = decoding.drops_first_space and name.startswith(decoding.space)
        return PieceTable(
            tuple(names),
            tuple(surfaces),
            tuple(partial),
            tuple(starts),
            tuple(control),
            byte_level=decoding.byte_level,
            control_joins=True,  # `tokenizers` leaves them out before it decodes
            max_shrink=self._max_shrink,
        )

    def encode(self, text: str) -> list[int]:
        return _encode(self._tokenizer, text)

    def encode_continuation(self, text: str) -> list[int]:
        return _encode(self._continuing, text)


def open_tokenizer_json(path: Path) -> TokenizerJsonModel:
    """Raises ConfigError."""
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read: {e}.", remedy="Download it again.") from e
    if not isinstance(spec, dict):
        raise ConfigError(f"{path} is not a JSON object.", remedy="Download it again.")
    return TokenizerJsonModel(spec, name=str(path))


def read_added_tokens(spec: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The added tokens of the format; what is not one is left out."""
    listed = spec.get("added_tokens")
    return {
        token["content"]: AddedToken(
            token["id"],
            special=token.get("special") is True,
            lstrip=token.get("lstrip") is True,
            rstrip=token.get("rstrip") is True,
            single_word=token.get("single_word") is True,
        )
        for token in (listed if isinstance(listed, list) else ())
        if isinstance(token, dict) and isinstance(token.get("id"), int) and token.get("content")
    }


def steps_of(step: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer, pre-tokenizer, decoder or post-processor of the format, or those in its sequence (under the key `inner`)."""
    if isinstance(step, dict):
        parts = step.get(inner)
        for part in parts if isinstance(parts, list) else [step]:
            if isinstance(part, dict):
                yield from (steps_of(part, inner) if part.get("type") == "Sequence" and part is not step else [part])


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What the decoder does with a token's name. space: the character that stands for a space."""

    byte_level: bool = False
    byte_fallback: bool = False
    space: str = "▁"
    drops_first_space: bool = False


def _read_decoding(spec: Mapping[str, Any], name: str) -> _Decoding:
    steps = list(steps_of(spec.get("decoder"), "decoders"))
    by_type = {str(step.get("type")): step for step in steps}
    unknown = set(by_type) - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    if not steps or unknown:
        what = f"the decoder {min(unknown)}" if unknown else "no decoder"
        raise ConfigError(f"{name} has {what}, which is not supported.", remedy=_REMEDY)
    if "ByteLevel" in by_type:
        return _Decoding(byte_level=True)
    metaspace, replace, strip = (by_type.get(kind, {}) for kind in ("Metaspace", "Replace", "Strip"))
    space = metaspace.get("replacement") or replace.get("pattern", {}).get("String") or "▁"
    drops = strip.get("start", 0) > 0 if strip else False
    if metaspace:
        drops = (
            metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never") != "never"
        )
    return _Decoding(byte_fallback="ByteFallback" in by_type, space=space, drops_first_space=drops)


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """A unigram model lists its pieces with their scores, in the order of their ids."""
    listed: Any = model["vocab"]
    return listed if isinstance(listed, dict) else {name: i for i, (name, _) in enumerate(listed)}


def _unk_id(model: Mapping[str, Any]) -> int | None:
    if isinstance(model["vocab"], dict):
        name = model.get("unk_token")
        return None if name is None else model["vocab"].get(name)
    return model.get("unk_id")


def _special_ids(spec: Mapping[str, Any]) -> SpecialIds:
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    for step in steps_of(spec.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            parts = step["single"]
            at = next(i for i, part in enumerate(parts) if "Sequence" in part)
            ids = [step["special_tokens"][p["SpecialToken"]["id"]]["ids"] if "SpecialToken" in p else [] for p in parts]
            prefix = tuple(i for part in ids[:at] for i in part)
            suffix = tuple(i for part in ids[at:] for i in part)
        elif step.get("type") in ("BertProcessing", "RobertaProcessing"):
            prefix, suffix = (step["cls"][1],), (step["sep"][1],)
    return SpecialIds(unk=_unk_id(spec["model"]), prefix=prefix, suffix=suffix)


def _without_special_tokens(spec: Mapping[str, Any], added: Mapping[str, AddedToken]) -> dict[str, Any]:
    """The format with a model that cannot write a special token: without them, and without the merges that make or use one.

    A model may list its special tokens in its vocabulary too, and generated merges even lead to them.
    """
    model = spec["model"]
    if not isinstance(model["vocab"], dict):
        plain = _unigram_without_special(model, added)
        return {**spec, "model": plain, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    kept_name = model.get("unk_token")
    banned = {content for content, token in added.items() if token.special and content != kept_name}
    banned_and_unk = banned | ({kept_name} if kept_name in added else set())
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    model = model | {
        "type": "BPE",
        "dropout": None,
        "vocab": {name: i for name, i in model["vocab"].items() if name not in banned},
        "merges": [[a, b] for a, b in merges if a + b not in banned_and_unk and a not in banned and b not in banned],
    }
    return {**spec, "model": model, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}


def _unigram_without_special(model: Mapping[str, Any], added: Mapping[str, AddedToken]) -> dict[str, Any]:
    """Special tokens keep their places, which are their ids, under names that no text can guess."""
    nonce = secrets.token_hex(16)
    hidden = {token.id for token in added.values() if token.special}
    vocab = [[f"{nonce} {i}" if i in hidden else name, score] for i, (name, score) in enumerate(model["vocab"])]
    return {**model, "type": "Unigram", "vocab": vocab}


def _without_first_space(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The format for text in the middle of other text: nothing writes a space before it."""
    normalizers = [s for s in steps_of(spec.get("normalizer"), "normalizers") if s.get("type") != "Prepend"]
    steps = [
        {**step, **{k: v for k, v in _PREPENDING.get(str(step.get("type")), {}).items() if k in step}}
        for step in steps_of(spec.get("pre_tokenizer"), "pretokenizers")
    ]
    found = dict(spec)
    if len(normalizers) < len(list(steps_of(spec.get("normalizer"), "normalizers"))):
        found["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    if steps != list(steps_of(spec.get("pre_tokenizer"), "pretokenizers")):
        found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return found


def _check_ids(ids: list[Any]) -> None:
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < _MAX_TOKENS]
    if wrong:
        raise ValueError(f"the token id {wrong[0]!r}")


def _shrinks(step: Mapping[str, Any]) -> int:
    kind, pattern = str(step.get("type")), step.get("pattern", {})
    if kind == "Replace" and len(pattern.get("String", "xx")) <= len(step.get("content", "")):
        return 1
    return _SHRINKING.get(kind, _ANY)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    check_unicode(text)
    # A batch of one: the package holds the interpreter lock while it encodes a single text.
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _fallback_byte(name: str) -> bytes | None:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes((int(name[3:5], 16),))
        except ValueError:
            return None
    return None
