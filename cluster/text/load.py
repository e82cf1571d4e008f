"""Loads what a gateway needs to turn text into tokens and back from the model's folder. Knows which chat template is used.

--chat-template     the template
auto (default)      the checkpoint's own Jinja template if it is not Mistral's (it has no [INST]); otherwise mistral-common's
v1, v2, v3          mistral-common's, in that version
jinja               the checkpoint's own, in tokenizer_config.json or chat_template.jinja
PATH.jinja          that file, with the checkpoint's special tokens
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.text.chat.template import ChatTemplate
    from cluster.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def load_text(folder: Path, *, chat_template: str, model_vocab_size: int) -> "tuple[Tokenizer, ChatTemplate | None]":
    """The tokenizer and the chat template. With "auto" the template is None if the model cannot chat. Raises ConfigError.

    chat_template: a value of the table above, with an absolute path for a file.
    """
    from cluster.text.tokenizer import TEMPLATE_VERSIONS, load_tokenizer

    version = next((v for v in TEMPLATE_VERSIONS if v == chat_template), None)
    tokenizer = load_tokenizer(folder, version=version, model_vocab_size=model_vocab_size)
    try:
        return tokenizer, _choose(tokenizer, folder, chat_template, model_vocab_size=model_vocab_size)
    except ConfigError as e:
        if chat_template != "auto":
            raise
        log.warning("Chat is off: %s", e)
        return tokenizer, None


def _choose(tokenizer: "Tokenizer", folder: Path, option: str, *, model_vocab_size: int) -> "ChatTemplate":
    from cluster.text.chat.jinja_template import JinjaTemplate
    from cluster.text.chat.mistral_template import MistralTemplate
    from cluster.text.chat.template_files import DEFAULT, read_source, read_template_files

    if option in ("v1", "v2", "v3"):
        return MistralTemplate(tokenizer)
    files = read_template_files(folder)
    if option == "auto":
        own = files.templates.get(DEFAULT) or next(iter(files.templates.values()), None)
        if own is None or "[INST]" in own:
            why = "the checkpoint has none" if own is None else "the checkpoint's own is for Mistral's family"
            log.info("chat template: mistral-common's %s, since %s", tokenizer.template_version, why)
            return MistralTemplate(tokenizer)
        log.info("chat template: the checkpoint's own, since it is not for Mistral's family (it has no [INST])")
    elif option == "jinja":
        if not files.templates:
            raise ConfigError(
                f"--chat-template jinja: {folder} has no template in tokenizer_config.json or chat_template.jinja.",
                remedy="Pass the path of a template, or use --chat-template auto.",
                param="--chat-template",
            )
        log.info("chat template: the checkpoint's own, as requested")
    else:
        files = replace(files, templates={DEFAULT: read_source(Path(option))})
        log.info("chat template: %s, as requested", option)
    return JinjaTemplate(tokenizer, files, model_vocab_size=model_vocab_size)
