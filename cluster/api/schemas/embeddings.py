"""Body and response of /v1/embeddings. Knows types and bounds; what needs the model is checked in endpoints/embeddings.py."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from cluster.api.schemas.base import MAX_VOCABULARY, Priority, UserName

MAX_INPUTS = 2048


class EmbeddingRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`input` has the same forms as a completion's `prompt`. An embedding is the mean of the last hidden states over the tokens.

    `dimensions`: only the model's own number is accepted.
    """

    model: str
    input: str | Annotated[list[str | int | list[int]], Meta(max_length=MAX_VOCABULARY)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
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
    data: list[EmbeddingItem]
    model: str
    usage: InputUsage
    object: str = "list"
