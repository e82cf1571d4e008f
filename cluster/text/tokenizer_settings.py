"""Reads how a checkpoint in Hugging Face's layout uses its vocabulary: added and special tokens, and what a prompt starts with.

Knows tokenizer_config.json and the files next to it, and transformers' rules about them. Does not know chat templates
(chat/template_files.py) or how text is encoded.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from workers.errors import ConfigError
from workers.tokenizer_files.pieces import AddedToken

SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MORE_SPECIAL_KEYS = ("additional_special_tokens", "extra_special_tokens")
PrependScheme = Literal["always", "first", "never"]


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What the files say; the defaults are those of a folder without any, as in Mistral's layout.

    special_tokens: for example {"bos_token": "<s>"}. prepend_scheme: which parts of a text, split at special tokens, get a leading space:
    "always" each one (transformers' `legacy`), "first" only the start of the text. keeps_own_space: a part that begins with a space gets no
    second one, as a Metaspace pre-tokenizer has it. adds_bos, adds_eos: around a prompt. None: the files do not say.
    """

    special_tokens: dict[str, str] = field(default_factory=dict)
    added_tokens: dict[str, AddedToken] = field(default_factory=dict)
    prepend_scheme: PrependScheme | None = None
    keeps_own_space: bool = False
    adds_bos: bool | None = None
    adds_eos: bool | None = None


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """Whatever the folder has; every file is optional. Raises ConfigError for a file that cannot be read."""
    config = read_object(folder / "tokenizer_config.json")
    names = read_object(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    fast = read_object(folder / "tokenizer.json")
    return TokenizerSettings(
        special_tokens={key: content for key in SPECIAL_KEYS if (content := _content(names.get(key))) is not None},
        added_tokens=_added_tokens(folder, config, fast, special=set(_special_names(names))),
        prepend_scheme=_prepend_scheme(config, fast),
        keeps_own_space=any(p.get("type") == "Metaspace" for p in _parts(fast.get("pre_tokenizer"), "pretokenizers")),
        adds_bos=_flag(config.get("add_bos_token")),
        adds_eos=_flag(config.get("add_eos_token")),
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no file. Raises ConfigError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read: {e}.", remedy="Download it again.") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object.", remedy="Download it again.")
    return value


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _prepend_scheme(config: Mapping[str, Any], fast: Mapping[str, Any]) -> PrependScheme | None:
    """tokenizer.json decides where it is clear, as in transformers. Otherwise `legacy`, and true is its value if it is missing or null."""
    for part in _parts(fast.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace":
            return next((s for s in ("always", "first", "never") if s == part.get("prepend_scheme")), "always")
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space") is True:
            return "always"
    if any(part.get("type") == "Prepend" for part in _parts(fast.get("normalizer"), "normalizers")):
        return "always"
    if not config:
        return None
    if config.get("add_prefix_space") is False:
        return "never"
    return "first" if config.get("legacy") is False else "always"


def _parts(step: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer of tokenizer.json, or those in its sequence."""
    if isinstance(step, dict):
        parts = step.get(inner)
        yield from (part for part in (parts if isinstance(parts, list) else [step]) if isinstance(part, dict))


def _added_tokens(
    folder: Path, config: Mapping[str, Any], fast: Mapping[str, Any], *, special: set[str]
) -> dict[str, AddedToken]:
    """From the files in transformers' order of precedence, the strongest last."""
    found: dict[str, AddedToken] = {}
    listed = fast.get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict) and (name := _content(token)) and isinstance(token.get("id"), int):
            found[name] = _added(token["id"], token, special=name in special)
    for name, token_id in read_object(folder / "added_tokens.json").items():
        if isinstance(token_id, int) and name:
            found.setdefault(name, AddedToken(token_id, special=name in special))
    decoder = config.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        decoded = _content(token)
        if not key.isdecimal() or not decoded:
            raise ConfigError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has an entry without an id or content.",
                remedy="Give each entry both.",
            )
        found[decoded] = _added(int(key), token, special=decoded in special)
    return found


def _added(token_id: int, token: Any, *, special: bool) -> AddedToken:
    flags = token if isinstance(token, dict) else {}
    return AddedToken(
        token_id,
        special=special or flags.get("special") is True,
        lstrip=flags.get("lstrip") is True,
        rstrip=flags.get("rstrip") is True,
        single_word=flags.get("single_word") is True,
    )


def _special_names(names: Mapping[str, Any]) -> Iterator[str]:
    """All tokens that the files call special, by whatever key."""
    for key in (*SPECIAL_KEYS, *_MORE_SPECIAL_KEYS):
        value = names.get(key)
        if isinstance(value, dict) and "content" not in value:  # names of the checkpoint's own
            value = list(value.values())
        for token in value if isinstance(value, list) else [value]:
            if content := _content(token):
                yield content


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
