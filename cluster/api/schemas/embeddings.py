"""Body and response of /v1/embeddings. Knows types and bounds; what needs the model is checked in endpoints/embeddings.py."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from cluster.api.schemas.base import MAX_VOCABULARY, Priority, UserName

MAX_INPUTS = 2048


class EmbeddingRequest(Struct, frozen=True, kw_only=True):
    """`input` has the same forms as a completion's `prompt`. An embedding is the mean of the last hidden states over the tokens.

    `dimensions`: the first so many numbers, scaled to length 1; at most the model's own number, which changes nothing. `output_dimension`
    is Mistral's name for it, and `output_dtype` Mistral's name for the type of the numbers.
    """

    model: str
    input: str | Annotated[list[str | int | list[int]], Meta(max_length=MAX_VOCABULARY)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    output_dimension: Annotated[int, Meta(ge=1)] | None = None
    output_dtype: Literal["float"] | None = None
    user: UserName | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    priority: Priority | None = None


class EmbeddingItem(Struct, frozen=True, kw_only=True):
    """`embedding`: a list of numbers, or base64 of little-endian float32 values."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class InputUsage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, frozen=True, kw_only=True):
    """`id`: an addition of Mistral's and vLLM's."""

    id: str
    data: list[EmbeddingItem]
    model: str
    usage: InputUsage
    object: str = "list"
