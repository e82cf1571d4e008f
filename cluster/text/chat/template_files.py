"""Reads the chat settings of a checkpoint in Hugging Face's layout: templates, special tokens, and tokens added to the vocabulary.

Knows tokenizer_config.json, chat_template.jinja and the files next to them. Does not know how a template is rendered.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.errors import ConfigError

_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
DEFAULT, TOOL_USE = "default", "tool_use"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A string that is one token. lstrip, rstrip: white space before or after it is dropped."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class TemplateFiles:
    """templates: Jinja sources by name. special_tokens: for example {"bos_token": "<s>"}. legacy: the text after every special token is
    encoded with a leading space, not only the start of the text.
    """

    templates: dict[str, str] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    added_tokens: dict[str, AddedToken] = field(default_factory=dict)
    legacy: bool = False


def read_template_files(folder: Path) -> TemplateFiles:
    """Whatever the folder has; every file is optional. Raises ConfigError for a file that cannot be read."""
    config = _read_object(folder / "tokenizer_config.json")
    templates: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        templates[DEFAULT] = inline
    elif isinstance(inline, list):
        for item in inline:
            if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str):
                templates[item["name"]] = item["template"]
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_source(path)
    if (folder / "chat_template.jinja").is_file():
        templates[DEFAULT] = read_source(folder / "chat_template.jinja")
    special_tokens = {key: content for key in _SPECIAL_KEYS if (content := _content(config.get(key))) is not None}
    return TemplateFiles(templates, special_tokens, _added_tokens(folder, config), bool(config.get("legacy", False)))


def read_source(path: Path) -> str:
    """The source of a template. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"The chat template {path} cannot be read: {e}.") from e


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, AddedToken]:
    found: dict[str, AddedToken] = {}
    for content, token_id in _read_object(folder / "added_tokens.json").items():
        if isinstance(token_id, int) and content:
            found[content] = AddedToken(token_id)
    decoder = config.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        name = _content(token)
        if not key.isdecimal() or not name:
            raise ConfigError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has an entry without an id or content."
            )
        flags = token if isinstance(token, dict) else {}
        found[name] = AddedToken(int(key), lstrip=bool(flags.get("lstrip")), rstrip=bool(flags.get("rstrip")))
    return found


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read: {e}.") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object.")
    return value
