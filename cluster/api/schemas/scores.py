"""Bodies and responses of /v1/score and /v1/rerank, with vLLM's names. Knows types and bounds; endpoints/scores.py computes."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from cluster.api.schemas.base import Priority, UserName
from cluster.api.schemas.embeddings import MAX_INPUTS, InputUsage

Texts = str | Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]
Scoring = Literal["similarity", "logprob"]


class ScoreRequest(Struct, frozen=True, kw_only=True):
    """Scores of pairs: one `text_1` with each of `text_2`, or as many of both, pair by pair.

    `scoring`: "similarity", the default, is the cosine of the two texts' embeddings. "logprob" is the log-probability of `text_2` as the
    continuation of `text_1`, the sum over its tokens.
    """

    model: str
    text_1: Texts
    text_2: Texts
    scoring: Scoring | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    priority: Priority | None = None
    user: UserName | None = None


class ScoreItem(Struct, frozen=True, kw_only=True):
    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreList(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    data: list[ScoreItem]
    usage: InputUsage
    object: Literal["list"] = "list"


class RerankDocument(Struct, frozen=True, kw_only=True):
    text: str


class RerankRequest(Struct, frozen=True, kw_only=True):
    """Orders `documents` by their score for `query`, best first. `top_n`: how many to return; 0 means all. `scoring`: as in /v1/score, with
    the document as the continuation of the query.
    """

    model: str
    query: str
    documents: Annotated[list[str | RerankDocument], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Meta(ge=0)] | None = None
    return_documents: bool | None = None
    scoring: Scoring | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    priority: Priority | None = None
    user: UserName | None = None


class RerankResult(Struct, frozen=True, kw_only=True):
    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankUsage(Struct, frozen=True, kw_only=True):
    total_tokens: int


class RerankResponse(Struct, frozen=True, kw_only=True):
    id: str
    model: str
    usage: RerankUsage
    results: list[RerankResult]
