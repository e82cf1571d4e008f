"""Loads what a gateway needs to turn text into tokens and back from the model's folder. Knows which chat template is used.

--chat-template     the template
auto (default)      the checkpoint's own Jinja template, unless it is one that Mistral publishes (chat/published.py) or there is none:
                    then mistral-common's
v1, v2, v3          mistral-common's, in that version
jinja               the checkpoint's own, in tokenizer_config.json or chat_template.jinja
PATH.jinja          that file, with the checkpoint's special tokens
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.text.chat.template import ChatTemplate
    from cluster.text.chat.template_files import TemplateFiles
    from cluster.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedText:
    """choice: which template is used and why, for a reader."""

    tokenizer: "Tokenizer"
    chat_template: "ChatTemplate"
    choice: str


def load_text(folder: Path, *, chat_template: str, model_vocab_size: int) -> LoadedText:
    """The tokenizer and the chat template. Raises ConfigError, also for a template that would fail on every conversation.

    chat_template: a value of the table above, with an absolute path for a file.
    """
    from cluster.text.tokenizer import TEMPLATE_VERSIONS, load_tokenizer

    version = next((v for v in TEMPLATE_VERSIONS if v == chat_template), None)
    tokenizer = load_tokenizer(folder, version=version, model_vocab_size=model_vocab_size)
    template, choice = _choose(tokenizer, folder, chat_template, model_vocab_size=model_vocab_size)
    log.info("chat template: %s", choice)
    return LoadedText(tokenizer, template, choice)


def _choose(tokenizer: "Tokenizer", folder: Path, option: str, *, model_vocab_size: int) -> "tuple[ChatTemplate, str]":
    from cluster.text.chat.mistral_template import MistralTemplate
    from cluster.text.chat.published import published_name
    from cluster.text.chat.template_files import DEFAULT, TemplateFiles, read_source, read_template_files

    if option in ("v1", "v2", "v3"):
        return MistralTemplate(tokenizer), f"mistral-common's {option}, as requested"
    if option not in ("auto", "jinja"):
        files = TemplateFiles({DEFAULT: read_source(Path(option))})
        return _jinja(tokenizer, files, option, model_vocab_size=model_vocab_size), f"{option}, as requested"
    files = read_template_files(folder)
    if option == "auto":
        own = files.templates.get(DEFAULT)
        published = published_name(own) if own is not None else None
        if not files.templates or published is not None:
            why = f"the checkpoint's own is that of {published}" if published else "the checkpoint has none"
            return MistralTemplate(tokenizer), f"mistral-common's {tokenizer.template_version}, since {why}"
        why = "which Mistral does not publish"
    else:
        if not files.templates:
            raise ConfigError(
                f"--chat-template jinja: {folder} has no template in tokenizer_config.json or chat_template.jinja.",
                remedy="Pass the path of a template, or use --chat-template auto.",
                param="--chat-template",
            )
        why = "as requested"
    template = _jinja(tokenizer, files, str(folder), model_vocab_size=model_vocab_size)
    return template, f"the checkpoint's own, {why}"


def _jinja(tokenizer: "Tokenizer", files: "TemplateFiles", origin: str, *, model_vocab_size: int) -> "ChatTemplate":
    from cluster.text.chat.jinja_template import JinjaTemplate

    try:
        return JinjaTemplate(tokenizer, files, model_vocab_size=model_vocab_size)
    except ConfigError as e:
        raise ConfigError(
            f"{origin}: {e.message}",
            remedy="Correct it, or choose another template with --chat-template.",
            param="--chat-template",
        ) from e
