"""Responses of /v1/models. Knows no server; endpoints/models.py fills them in."""

from typing import Literal

from msgspec import Struct


class Capabilities(Struct, frozen=True, kw_only=True):
    """What the model can be used for, under Mistral's names."""

    completion_chat: bool
    function_calling: bool
    moderation: bool
    completion_fim: bool = False
    fine_tuning: bool = False
    vision: bool = False
    classification: bool = False


class ModelCard(Struct, frozen=True, kw_only=True):
    """OpenAI's card, `max_model_len` from vLLM's, and what Mistral's client requires.

    `max_model_len`, `max_context_length`: the context length in tokens; null until a replica has reported it. `aliases`: the model's other
    names. `root`: where an adapter was loaded from, the model's own name otherwise. `parent`: the model that an adapter belongs to.
    """

    id: str
    created: int
    max_model_len: int | None
    max_context_length: int | None
    aliases: list[str]
    capabilities: Capabilities
    object: str = "model"
    owned_by: str = "tramontane"
    type: Literal["base", "fine-tuned"] = "base"
    root: str | None = None
    parent: str | None = None


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: str = "list"
