"""Everything a gateway needs to turn text into tokens and back, read from the model's folder. Knows what chat can do without."""

import logging
from typing import TYPE_CHECKING

from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.config import ServeConfig
    from cluster.text.chat import ChatTemplate
    from cluster.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def load_text(config: "ServeConfig") -> "tuple[Tokenizer, ChatTemplate | None]":
    """The tokenizer, and the chat template or None for a model that cannot chat. Raises ConfigError."""
    from cluster.text.chat import MistralTemplate
    from cluster.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(
        config.engine.model_path, version=config.chat_template, model_vocab_size=config.engine.model.vocab_size
    )
    try:
        return tokenizer, MistralTemplate(tokenizer)
    except ConfigError as e:
        if config.chat_template is not None:
            raise
        log.warning("Chat is off: %s", e)
        return tokenizer, None
