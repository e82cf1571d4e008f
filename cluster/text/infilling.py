"""Fill in the middle: the prompt that asks a model for the text between a prefix and a suffix.

Knows Mistral's format, `<s>[SUFFIX]suffix[PREFIX]prefix`, with the same ids as mistral-common's encode_fim. The answer continues after
the prefix, as in a completion.
"""

from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError


def encode_infilling(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """The prompt's token ids. Raises RequestError if the vocabulary lacks [PREFIX] and [SUFFIX], as v1 and v2 do."""
    prefix_id, suffix_id = tokenizer.control_token_id("[PREFIX]"), tokenizer.control_token_id("[SUFFIX]")
    if prefix_id is None or suffix_id is None:
        raise RequestError(
            "This model cannot fill in the middle: its vocabulary has no [PREFIX] and [SUFFIX].",
            remedy="Remove 'suffix' from the request.",
            param="suffix",
        )
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    try:
        suffix_ids = tokenizer.encode_continuation(suffix) if suffix else []
    except RequestError as e:
        raise RequestError(e.message, remedy=e.remedy, param="suffix") from e
    return [*bos, suffix_id, *suffix_ids, prefix_id, *tokenizer.encode(prefix, bos=False)]
