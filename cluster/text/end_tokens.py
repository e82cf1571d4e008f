"""The tokenizer's own end-of-sequence token, which ends an answer as those of config.json and generation_config.json do.

Knows where a checkpoint in Hugging Face's layout writes it. Mistral's own layout writes it nowhere.
"""

from pathlib import Path

from cluster.text.sentencepiece_model import SentencePieceModel
from cluster.text.tokenizer import find_tokenizer
from cluster.text.tokenizer_settings import read_tokenizer_settings
from workers.errors import ConfigError


def tokenizer_end_tokens(folder: Path) -> tuple[int, ...]:
    """At most one id; none without a tokenizer that is supported. Raises ConfigError for a file that cannot be read.

    {"eos_token": "<|im_end|>"} in tokenizer_config.json is the id that added_tokens_decoder or added_tokens.json gives it or, without
    these, the SentencePiece model's piece of that name. Without a name it is the SentencePiece model's own.
    """
    settings = read_tokenizer_settings(folder)
    name = settings.special_tokens.get("eos_token")
    if name in settings.added_tokens:
        return (settings.added_tokens[name].id,)
    try:
        model = SentencePieceModel(find_tokenizer(folder))
    except ConfigError:  # loading the tokenizer raises it again
        return ()
    names = () if name is None else model.pieces.names
    return (names.index(name) if name in names else model.eos_token_id,)
