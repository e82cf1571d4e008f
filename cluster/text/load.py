"""Everything a gateway needs to turn text into tokens and back, read from the model's folder. Knows what chat can do without.

--chat-template     the template
auto (default)      the checkpoint's own Jinja template if it is of another family: it has no [INST]; else mistral-common's
v1, v2, v3          mistral-common's of that version
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
    """The tokenizer, and the chat template or None for a model that cannot chat. Raises ConfigError.

    chat_template: as in the table above; a file by its absolute path.
    """
    from cluster.text.tokenizer import TEMPLATE_VERSIONS, load_tokenizer

    asked = chat_template
    version = next((v for v in TEMPLATE_VERSIONS if v == asked), None)
    tokenizer = load_tokenizer(folder, version=version, model_vocab_size=model_vocab_size)
    try:
        return tokenizer, _choose(tokenizer, folder, asked, model_vocab_size=model_vocab_size)
    except ConfigError as e:
        if asked != "auto":
            raise
        log.warning("Chat is off: %s", e)
        return tokenizer, None


def _choose(tokenizer: "Tokenizer", folder: Path, asked: str, *, model_vocab_size: int) -> "ChatTemplate":
    from cluster.text.chat.jinja_template import JinjaTemplate
    from cluster.text.chat.template import MistralTemplate
    from cluster.text.chat.template_files import DEFAULT, read_source, read_template_files

    if asked in ("v1", "v2", "v3"):
        return MistralTemplate(tokenizer)
    files = read_template_files(folder)
    if asked == "auto":
        own = files.templates.get(DEFAULT) or next(iter(files.templates.values()), None)
        if own is None or "[INST]" in own:
            why = "the checkpoint brings none" if own is None else "the checkpoint's own is of Mistral's family"
            log.info("chat template: mistral-common's %s, since %s", tokenizer.template_version, why)
            return MistralTemplate(tokenizer)
        log.info("chat template: the checkpoint's own, since it is of another family than Mistral's (it has no [INST])")
    elif asked == "jinja":
        if not files.templates:
            raise ConfigError(
                f"--chat-template jinja: {folder} has no template in tokenizer_config.json or chat_template.jinja."
            )
        log.info("chat template: the checkpoint's own, as asked")
    else:
        files = replace(files, templates={DEFAULT: read_source(Path(asked))})
        log.info("chat template: %s, as asked", asked)
    return JinjaTemplate(tokenizer, files, model_vocab_size=model_vocab_size)
