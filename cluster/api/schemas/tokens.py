"""Bodies and responses of /tokenize, /detokenize and /tokenizer_info. Knows types and bounds, no tokenizer."""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.api.schemas.base import TokenIds
from cluster.api.schemas.chat import MAX_MESSAGES, ChatMessage, TemplateKwargs, Tool

MAX_TOKENIZE_CHARS = 1_000_000


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """Send either `prompt` or `messages`; `messages`, with `tools`, go through the chat template.

    `add_special_tokens`: whether a prompt starts with the beginning-of-sequence token; true by default. The options of the template are
    those of chat.
    """

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=MAX_TOKENIZE_CHARS)] | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(Struct, frozen=True, kw_only=True):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    tokens: TokenIds
    model: str | None = None


class DetokenizeResponse(Struct, frozen=True, kw_only=True):
    prompt: str


class TokenizerInfo(Struct, frozen=True, kw_only=True):
    """What a tokenizer_config.json says, as far as clients need it. `chat_template`: null if the template is not in Jinja."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str
    pad_token: str | None
    add_bos_token: bool
    add_eos_token: bool
    model_max_length: int
    vocab_size: int
    chat_template: str | None
