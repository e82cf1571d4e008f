"""Bodies and responses of /tokenize and /detokenize. Knows types and bounds, no tokenizer."""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.api.schemas.base import TokenIds
from cluster.api.schemas.chat import MAX_MESSAGES, ChatMessage, Tool

MAX_TOKENIZE_CHARS = 1_000_000


class TokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Send either `prompt` or `messages`; `messages`, with `tools`, go through the chat template.

    `add_special_tokens`: whether a prompt starts with the beginning-of-sequence token; true by default.
    """

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=MAX_TOKENIZE_CHARS)] | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(Struct, frozen=True, kw_only=True):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tokens: TokenIds
    model: str | None = None


class DetokenizeResponse(Struct, frozen=True, kw_only=True):
    prompt: str
