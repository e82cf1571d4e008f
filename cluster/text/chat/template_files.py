"""Reads the chat templates of a checkpoint in Hugging Face's layout. Does not know how a template is rendered."""

from dataclasses import dataclass, field
from pathlib import Path

from cluster.text.tokenizer_settings import read_object
from workers.errors import ConfigError

DEFAULT, TOOL_USE = "default", "tool_use"


@dataclass(frozen=True, slots=True)
class TemplateFiles:
    """Jinja sources by name."""

    templates: dict[str, str] = field(default_factory=dict)


def read_template_files(folder: Path) -> TemplateFiles:
    """Whatever the folder has; every file is optional. Raises ConfigError for a file that cannot be read."""
    templates: dict[str, str] = {}
    inline = read_object(folder / "tokenizer_config.json").get("chat_template")
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
    return TemplateFiles(templates)


def read_source(path: Path) -> str:
    """The source of a template. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"The chat template {path} cannot be read: {e}.", remedy="Download it again.") from e
