"""Responses of /v1/models. Knows no server; endpoints/models.py fills them in."""

from msgspec import Struct


class ModelCard(Struct, frozen=True, kw_only=True):
    """`max_model_len`: the context length in tokens; null until a replica has reported it."""

    id: str
    created: int
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "tramontane"


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: str = "list"
