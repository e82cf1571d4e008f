"""Body and response of /v1/completions. A streamed chunk has the same form as the response."""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.api.schemas.base import (
    MAX_N,
    GenerationRequest,
    NumLogprobs,
    PromptLogprobs,
    SampledRequest,
    Usage,
)


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """`prompt` is a text, a list of texts, a list of token ids, or a list of such lists. `suffix`: fill in the text before it.

    `add_special_tokens`: whether a text starts with the beginning-of-sequence token; true by default.
    """

    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    add_special_tokens: bool | None = None

    @property
    def num_copies(self) -> int:
        """How many sequences are generated for each prompt."""
        return self.best_of or self.n or 1


class FimRequest(SampledRequest, frozen=True, kw_only=True):
    """Mistral's body: the model writes what comes between `prompt` and `suffix`. `max_tokens`: all that fits by default."""

    prompt: str
    suffix: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    """Parallel lists. `text_offset` counts characters from the start of the choice's text. Null for the first token of an echoed prompt."""

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
    """A response, or one chunk of a stream: both have the same form."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: Usage | None = None
