"""The tokenizer's own end-of-sequence tokens, which end an answer as those of config.json and generation_config.json do.

Knows where a checkpoint in Hugging Face's layout, and a GGUF file, write them. Mistral's own layout writes them nowhere.
"""

from pathlib import Path

from cluster.text.tokenizer_file import find_tokenizer
from cluster.text.tokenizer_settings import read_tokenizer_settings
from workers.errors import ConfigError
from workers.tokenizer_files.opening import open_model


def tokenizer_end_tokens(location: Path) -> tuple[int, ...]:
    """None without a tokenizer that is supported. Raises ConfigError for a file that cannot be read.

    {"eos_token": "<|im_end|>"} in tokenizer_config.json is the id that added_tokens_decoder, added_tokens.json or tokenizer.json gives it
    or, without these, the vocabulary's piece of that name. Without a name it is what the tokenizer's own file says.
    """
    settings = read_tokenizer_settings(location)
    name = settings.special_tokens.get("eos_token")
    if name in settings.added_tokens:
        return (settings.added_tokens[name].id,)
    try:
        model = open_model(find_tokenizer(location))
    except ConfigError:  # loading the tokenizer raises it again
        return ()
    names = () if name is None else model.pieces.names
    return (names.index(name),) if name in names else model.special.ends
