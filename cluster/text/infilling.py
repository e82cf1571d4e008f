"""Fill in the middle: the prompt that asks a model for the text between a prefix and a suffix.

Knows Mistral's form, `<s>[SUFFIX]suffix[PREFIX]prefix`, ids as mistral-common's encode_fim gives them. The answer goes on behind the
prefix, like a completion's.
"""

from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError


def encode_infilling(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Raises RequestError where the vocabulary lacks [PREFIX] and [SUFFIX], as those of v1 and v2 do."""
    prefix_id, suffix_id = tokenizer.control_token_id("[PREFIX]"), tokenizer.control_token_id("[SUFFIX]")
    if prefix_id is None or suffix_id is None:
        raise RequestError(
            "This model cannot fill in the middle: its vocabulary has no [PREFIX] and [SUFFIX]; leave 'suffix' out.",
            param="suffix",
        )
    try:
        behind = tokenizer.encode_continuation(suffix) if suffix else []
    except RequestError as e:
        raise RequestError(str(e), param="suffix") from e
    return [tokenizer.bos_token_id, suffix_id, *behind, prefix_id, *tokenizer.encode(prefix, bos=False)]
