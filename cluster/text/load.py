"""Loads what a gateway needs to turn text into tokens and back from the model's location. Knows which chat template is used, and why.

--chat-template     the template
auto (default)      1. the checkpoint's own Jinja template, unless it is Mistral's (chat/published.py);
                    2. mistral-common's, in the version of the tokenizer, if the template or the tokenizer is Mistral's own;
                    3. none: chat is refused, since a model answers badly in a format that it was not trained on
v1, v2, v3, ...     mistral-common's, in that version
jinja               the checkpoint's own (chat/template_files.py)
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
TEKKEN = "-tekken"  # v3-tekken is v3 with a tekken vocabulary
_NONE = (
    "none: the checkpoint has no chat template, and its tokenizer is not one of Mistral's. Chat is refused until "
    "--chat-template names one; /v1/completions works"
)


@dataclass(frozen=True, slots=True)
class LoadedText:
    """choice: which template is used and why, for a reader. chat_template: None for a model that nobody knows how to chat with."""

    tokenizer: "Tokenizer"
    chat_template: "ChatTemplate | None"
    choice: str


def load_text(folder: Path, *, chat_template: str, model_vocab_size: int) -> LoadedText:
    """The tokenizer and the chat template. Raises ConfigError, also for a template that would fail on every conversation.

    folder: or a GGUF file. chat_template: a value of the table above, with an absolute path for a file.
    """
    from cluster.text.tokenizer import TEMPLATE_VERSIONS, load_tokenizer

    version = next((v for v in TEMPLATE_VERSIONS if v == chat_template.removesuffix(TEKKEN)), None)
    tokenizer = load_tokenizer(folder, version=version, model_vocab_size=model_vocab_size)
    template, choice = _choose(tokenizer, folder, chat_template, model_vocab_size=model_vocab_size)
    log.info("chat template: %s", choice)
    return LoadedText(tokenizer, template, choice)


def _choose(
    tokenizer: "Tokenizer", folder: Path, option: str, *, model_vocab_size: int
) -> "tuple[ChatTemplate | None, str]":
    from cluster.text.chat.mistral_template import MistralTemplate
    from cluster.text.chat.published import format_name, is_release, own_version, published_name
    from cluster.text.chat.template_files import DEFAULT, TemplateFiles, read_source, read_template_files
    from cluster.text.tokenizer import TEMPLATE_VERSIONS

    if option.removesuffix(TEKKEN) in TEMPLATE_VERSIONS:
        if option.endswith(TEKKEN) and tokenizer.model.kind != "tekken":
            raise ConfigError(
                f"--chat-template {option} is for a tekken.json, but this checkpoint's tokenizer is {tokenizer.path.name}.",
                remedy=f"Use {option.removesuffix(TEKKEN)}, or auto.",
                param="--chat-template",
            )
        return MistralTemplate(tokenizer), f"mistral-common's {option}, as requested"
    if option not in ("auto", "jinja"):
        files = TemplateFiles({DEFAULT: read_source(Path(option))})
        return _jinja(tokenizer, files, option, model_vocab_size=model_vocab_size), f"{option}, as requested"
    files = read_template_files(folder)
    if option == "auto":
        own = files.templates.get(DEFAULT)
        published = published_name(own) if own is not None else None
        # Mistral's own template fits a vocabulary with more tokens as well.
        version = own_version(tokenizer) or (tokenizer.template_version if published is not None else None)
        if version is not None:
            why = None
            if published is not None:
                why = f"the checkpoint's own is that of {published}"
            elif own is not None and is_release(tokenizer, own):
                why = f"the checkpoint has {tokenizer.path.name} of Mistral's release"
            elif not files.templates:
                why = f"the checkpoint has none, and its tokenizer ({tokenizer.path.name}) is Mistral's"
            if why is not None:
                return MistralTemplate(tokenizer), f"mistral-common's {version}, since {why}"
        if not files.templates:
            return None, _NONE
        why = f"that of {published}" if published is not None else "which is not one of Mistral's"
    else:
        if not files.templates:
            raise ConfigError(
                f"--chat-template jinja: {folder} has no template in chat_template.jinja, tokenizer_config.json or a GGUF file's metadata.",
                remedy="Pass the path of a template, or use --chat-template auto.",
                param="--chat-template",
            )
        why = "as requested"
    template = _jinja(tokenizer, files, str(folder), model_vocab_size=model_vocab_size)
    name = format_name(files.templates[DEFAULT])
    return template, f"the checkpoint's own, {why}" + (f" ({name})" if name else "")


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
