"""Reads the Jinja chat templates of a checkpoint: a folder in Hugging Face's layout, or a GGUF file. Does not know how one is rendered.

Where a name stands in several places, the later of these counts, as in transformers:

    chat_template.json                  what processors of models with images write; one template
    tokenizer_config.json               "chat_template": one template, or a list of named ones
    additional_chat_templates/NAME.jinja
    chat_template.jinja                 the default one; transformers 5 writes only this form

A GGUF file has them in its metadata: tokenizer.chat_template, and tokenizer.chat_template.NAME.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.text.tokenizer_settings import read_object
from workers.checkpoint.gguf.gguf_file import find_gguf, read_gguf
from workers.errors import ConfigError

DEFAULT, TOOL_USE = "default", "tool_use"
FILES = ("chat_template.json", "tokenizer_config.json", "chat_template.jinja")
_GGUF_KEY = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class TemplateFiles:
    """Jinja sources by name."""

    templates: dict[str, str] = field(default_factory=dict)


def read_template_files(location: Path) -> TemplateFiles:
    """Whatever the checkpoint has. Raises ConfigError for a file that cannot be read, CheckpointError for a damaged GGUF file."""
    gguf = find_gguf(location)
    return _of_gguf(read_gguf(gguf).metadata) if gguf is not None else _of_folder(location)


def _of_folder(folder: Path) -> TemplateFiles:
    templates: dict[str, str] = {}
    for file in ("chat_template.json", "tokenizer_config.json"):
        inline = read_object(folder / file).get("chat_template")
        if isinstance(inline, str):
            templates[DEFAULT] = inline
        for item in inline if isinstance(inline, list) else ():
            if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str):
                templates[item["name"]] = item["template"]
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_source(path)
    if (folder / "chat_template.jinja").is_file():
        templates[DEFAULT] = read_source(folder / "chat_template.jinja")
    return TemplateFiles(templates)


def _of_gguf(metadata: Mapping[str, Any]) -> TemplateFiles:
    named = {key.removeprefix(f"{_GGUF_KEY}."): source for key, source in metadata.items() if key.startswith(_GGUF_KEY)}
    default = named.pop(_GGUF_KEY, None)
    sources = named if default is None else {**named, DEFAULT: default}
    return TemplateFiles({name: source for name, source in sources.items() if isinstance(source, str)})


def read_source(path: Path) -> str:
    """The source of a template. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"The chat template {path} cannot be read: {e}.", remedy="Download it again.") from e
