"""Body and response of /v1/moderations, and OpenAI's names for the categories. endpoints/moderations.py computes the scores."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_MODERATIONS = 128  # each one computes its question once and 14 possible answers

# OpenAI's categories, each with those of Mistral's that it includes. Mistral's do not tell threats, instructions or gore from the rest of
# their category, so these sub-categories of OpenAI's are never the answer; typed clients require them.
OPENAI_CATEGORIES: dict[str, tuple[str, ...]] = {
    "harassment": ("hate violence harassment",),
    "harassment/threatening": (),
    "hate": ("hate violence harassment",),
    "hate/threatening": (),
    "illicit": ("illegal", "malware", "fraud"),
    "illicit/violent": ("physical harm",),
    "self-harm": ("physical harm",),
    "self-harm/instructions": (),
    "self-harm/intent": (),
    "sexual": ("adult", "child abuse"),
    "sexual/minors": ("child abuse",),
    "violence": ("hate violence harassment",),
    "violence/graphic": (),
}


class TextInput(Struct, frozen=True, kw_only=True):
    text: str
    type: Literal["text"]


class ModerationRequest(Struct, frozen=True, kw_only=True):
    """`input`: a text, several texts, or the parts of one text. `model` is optional; the default is the served model, and so are OpenAI's
    and Mistral's moderation models, for example `omni-moderation-latest`.
    """

    input: str | Annotated[list[str | TextInput], Meta(min_length=1, max_length=MAX_MODERATIONS)]
    model: str | None = None


class Moderation(Struct, frozen=True, kw_only=True):
    """Mistral's 13 categories and, by other names, OpenAI's. `flagged`: the text falls into one of them.

    `category_scores`: the model's probability of answering with each of Mistral's; "not moderated" has the rest to 1. One of OpenAI's has
    the sum of those that it includes.
    """

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


class ModerationResponse(Struct, frozen=True, kw_only=True):
    """`model`: the served model that judged."""

    id: str
    model: str
    results: list[Moderation]
