"""Bodies and answers of the endpoints beside generation: models, embeddings, moderations, tokens, version."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.api.schemas.base import MAX_VOCABULARY, Int32, TokenIds
from cluster.api.schemas.chat import MAX_MESSAGES, ChatMessage, Tool

MAX_INPUTS = 2048
MAX_MODERATIONS = 128  # each computes the question once and 14 answers
MAX_TOKENIZE_CHARS = 1_000_000


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "tramontane"


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: str = "list"


class EmbeddingRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`input` as the prompt of a completion. The embedding is the mean over the tokens of the last hidden states."""

    model: str
    input: str | Annotated[list[str | int | list[int]], Meta(max_length=MAX_VOCABULARY)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None  # only the model's own
    user: Annotated[str, Meta(max_length=1024)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    priority: Int32 | None = None


class EmbeddingItem(Struct, frozen=True, kw_only=True):
    """base64: of little-endian float32 values."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class InputUsage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, frozen=True, kw_only=True):
    data: list[EmbeddingItem]
    model: str
    usage: InputUsage
    object: str = "list"


class ModerationRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`model` may be left out: it is the served one."""

    input: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_MODERATIONS)]
    model: str | None = None


class Moderation(Struct, frozen=True, kw_only=True):
    """category_scores: the model's probability of answering with that category, "not moderated" being the rest to 1."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


class ModerationAnswer(Struct, frozen=True, kw_only=True):
    id: str
    model: str
    results: list[Moderation]


class TokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Either `prompt` or `messages` (with `tools`, through the chat template)."""

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=MAX_TOKENIZE_CHARS)] | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None  # the beginning-of-sequence token before a prompt; default true
    return_token_strs: bool | None = None


class TokenizeAnswer(Struct, frozen=True, kw_only=True):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tokens: TokenIds
    model: str | None = None


class DetokenizeAnswer(Struct, frozen=True, kw_only=True):
    prompt: str


class VersionAnswer(Struct, frozen=True, kw_only=True):
    version: str
