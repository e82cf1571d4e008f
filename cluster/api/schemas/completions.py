"""/v1/completions: its body and its answer, which, streamed, is also a chunk's shape."""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.api.schemas.base import GenerationRequest, NumLogprobs, PromptLogprobs, Usage


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`prompt` is a text, a list of texts, a list of token ids, or a list of such lists. `suffix`: fill in what stands before it."""

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    """Parallel lists. `text_offset` counts characters from the start of this choice's text. null: the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, frozen=True, kw_only=True):
    """An answer, and, streamed, one chunk of it: they have the same shape."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: Usage | None = None
