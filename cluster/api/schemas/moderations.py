"""Body and response of /v1/moderations. Knows types and bounds; endpoints/moderations.py computes the scores."""

from typing import Annotated

from msgspec import Meta, Struct

MAX_MODERATIONS = 128  # each one computes its question once and 14 possible answers


class ModerationRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`model` is optional; the default is the served model."""

    input: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_MODERATIONS)]
    model: str | None = None


class Moderation(Struct, frozen=True, kw_only=True):
    """`category_scores`: the model's probability of answering with each category. "not moderated" has the rest to 1."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


class ModerationResponse(Struct, frozen=True, kw_only=True):
    id: str
    model: str
    results: list[Moderation]
