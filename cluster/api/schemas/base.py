"""What several endpoints share: bounds, the parameters of every generation, usage.

Knows types, bounds and OpenAI's names, and vLLM's names for what OpenAI does not have. Checks that need the model (context length,
vocabulary) are in generation/sampling.py and generation/prompts.py. Unknown fields are accepted and reported (see parsing/lenient.py).
"""

from typing import Annotated

from msgspec import Meta, Struct

from cluster.api.schemas.structured import Choices, JsonSchema, Pattern, ResponseFormat, StructuredOutputs
from cluster.keys.key import MAX_PRIORITY, MIN_PRIORITY

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 128
MAX_VOCABULARY = 1_000_000  # more than any tokenizer has; bounds lists of token ids

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
UserName = Annotated[str, Meta(max_length=1024)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Priority = Annotated[int, Meta(ge=MIN_PRIORITY, le=MAX_PRIORITY)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
TokenIds = Annotated[list[int], Meta(max_length=MAX_VOCABULARY)]


class StreamOptions(Struct, frozen=True, kw_only=True):
    """`include_usage`: adds a last chunk with the usage. `continuous_usage_stats`: adds the usage so far to every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SampledRequest(Struct, frozen=True, kw_only=True):
    """The fields of every prompt that is continued. As with OpenAI, null means the default. `user` is written to the log.

    `top_p`: 0 takes the likeliest token. `random_seed`: Mistral's name for `seed`. `priority`: requests with smaller numbers run first.
    """

    model: str
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Meta(max_length=MAX_STOP_CHARS)]
        | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
        | None
    ) = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Fraction | None = None
    seed: Int64 | None = None
    random_seed: Int64 | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    priority: Priority | None = None
    user: UserName | None = None


class GenerationRequest(SampledRequest, frozen=True, kw_only=True):
    """The fields that completions and chat share.

    `top_k`: -1 and 0 mean no limit. `include_stop_str_in_output`: also shows what ended the output. `skip_special_tokens`: false shows
    special tokens, such as `</s>`. `truncate_prompt_tokens`: keeps the last n tokens; -1 keeps as many as fit.
    `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`: older names for the fields of `structured_outputs`.
    """

    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    # Additions to OpenAI's API, with vLLM's names.
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1, max_length=MAX_VOCABULARY)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def shows_special_tokens(self) -> bool:
        return self.skip_special_tokens is False

    @property
    def requested_seed(self) -> int | None:
        return self.random_seed if self.seed is None else self.seed

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int


class Usage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(Struct, frozen=True, kw_only=True):
    """vLLM's format: one alternative at one position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


# One entry per prompt token, by token id; null for the first token, which has nothing before it.
PromptLogprobs = list[dict[str, PromptLogprob] | None]
