"""What a checkpoint in Hugging Face's layout says of its chat: templates, special tokens, tokens added to the vocabulary.

Knows tokenizer_config.json, chat_template.jinja and their relatives, and nothing of how a template is rendered.
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
    """A string that is one token. lstrip, rstrip: it swallows the white space before or behind it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class TemplateFiles:
    """`templates`: Jinja sources by name. `special_tokens`: such as {"bos_token": "<s>"}. `legacy`: text behind each special token
    opens with a space, not only a text's first."""

    templates: dict[str, str] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    added_tokens: dict[str, AddedToken] = field(default_factory=dict)
    legacy: bool = False


def read_template_files(folder: Path) -> TemplateFiles:
    """All that is there; nothing of it has to be. Raises ConfigError for files that cannot be understood."""
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
    """Raises ConfigError."""
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
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has an entry without id or content."
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
