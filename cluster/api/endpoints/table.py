"""The table of endpoints. The HTTP router and /openapi.json both come from these rows, so they always agree.

Knows every endpoint's path, types and statuses, and under which paths Azure's clients look for them; folders have their own rows. The web
page's files are not in it (pages.py).
"""

from collections.abc import Iterator
from dataclasses import replace

from cluster.api.endpoints import (
    chat,
    completions,
    embeddings,
    fim,
    invocations,
    models,
    moderations,
    scores,
    tokens,
)
from cluster.api.endpoints.batches.rows import BATCHES
from cluster.api.endpoints.endpoint import BODY_ERRORS, MODEL_ERRORS, RUN_ERRORS, Endpoint
from cluster.api.endpoints.messages.rows import MESSAGES
from cluster.api.endpoints.operator.rows import OPERATOR
from cluster.api.endpoints.responses.rows import RESPONSES
from cluster.api.schemas import embeddings as embedding_schemas
from cluster.api.schemas import models as model_schemas
from cluster.api.schemas import moderations as moderation_schemas
from cluster.api.schemas import scores as score_schemas
from cluster.api.schemas import tokens as token_schemas
from cluster.api.schemas.chat import ChatChunk, ChatCompletion, ChatRequest
from cluster.api.schemas.completions import Completion, CompletionRequest, FimRequest
from cluster.config.platform import Platform

_OWN = (
    Endpoint(
        method="POST",
        path="/v1/completions",
        handler=completions.handle,
        summary="Create a completion for a prompt.",
        body=CompletionRequest,
        response=Completion,
        chunk=Completion,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/chat/completions",
        handler=chat.handle,
        summary="Create a response to a conversation.",
        body=ChatRequest,
        response=ChatCompletion,
        chunk=ChatChunk,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    *RESPONSES,
    *MESSAGES,
    Endpoint(
        method="POST",
        path="/v1/embeddings",
        handler=embeddings.handle,
        summary="Create embeddings of texts.",
        body=embedding_schemas.EmbeddingRequest,
        response=embedding_schemas.EmbeddingList,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/score",
        handler=scores.score,
        summary="Score pairs of texts by similarity, or one as the continuation of the other.",
        body=score_schemas.ScoreRequest,
        response=score_schemas.ScoreList,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/rerank",
        handler=scores.rerank,
        summary="Order documents by their score for a query.",
        body=score_schemas.RerankRequest,
        response=score_schemas.RerankResponse,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/fim/completions",
        handler=fim.handle,
        summary="Fill in the text between a prompt and a suffix, as Mistral's client speaks it.",
        body=FimRequest,
        response=ChatCompletion,
        chunk=ChatChunk,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/moderations",
        handler=moderations.handle,
        summary="Classify texts by Mistral's 13 moderation categories.",
        body=moderation_schemas.ModerationRequest,
        response=moderation_schemas.ModerationResponse,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="GET",
        path="/v1/models",
        handler=models.list_models,
        summary="List the served models.",
        response=model_schemas.ModelList,
    ),
    Endpoint(
        method="GET",
        path="/v1/models/{model:.+}",
        handler=models.get_model,
        summary="Retrieve a served model.",
        response=model_schemas.ModelCard,
        errors=(404,),
    ),
    Endpoint(
        method="POST",
        path="/tokenize",
        handler=tokens.tokenize,
        summary="Convert a prompt or a conversation to token ids.",
        body=token_schemas.TokenizeRequest,
        response=token_schemas.TokenizeResponse,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 429, 503),
    ),
    Endpoint(
        method="POST",
        path="/detokenize",
        handler=tokens.detokenize,
        summary="Convert token ids to text.",
        body=token_schemas.DetokenizeRequest,
        response=token_schemas.DetokenizeResponse,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/tokenizer_info",
        handler=tokens.tokenizer_info,
        summary="Get the tokenizer's special tokens and chat template.",
        response=token_schemas.TokenizerInfo,
        query=("model",),
        errors=(404, 503),
    ),
    *BATCHES,
    Endpoint(
        method="POST",
        path="/invocations",
        handler=invocations.handle,
        summary="Send the body of another endpoint, as hosting platforms do: a conversation, a prompt or texts to embed.",
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    *OPERATOR,
)

# The paths of OpenAI's client for Azure, where the deployment takes the place of the body's model. Its name may have slashes, so the
# first path that fits decides: `/chat/completions` comes before `/completions`.
_AZURE = {
    "/v1/chat/completions": "/openai/deployments/{deployment:.+}/chat/completions",
    "/v1/completions": "/openai/deployments/{deployment:.+}/completions",
    "/v1/embeddings": "/openai/deployments/{deployment:.+}/embeddings",
    "/v1/models": "/openai/models",
    "/v1/models/{model:.+}": "/openai/models/{model:.+}",
}


def _azure() -> Iterator[Endpoint]:
    own = {endpoint.path: endpoint for endpoint in _OWN}
    for path, azure_path in _AZURE.items():
        summary = f"{own[path].summary.removesuffix('.')}, at Azure's path."
        yield replace(own[path], path=azure_path, summary=summary, query=(*own[path].query, "api-version"))


def platform_paths(platform: Platform | None) -> Iterator[Endpoint]:
    """/ping and /invocations under the paths that the hosting platform calls, where these are not endpoints of their own."""
    own: dict[tuple[str, str], Endpoint] = {(endpoint.method, endpoint.path): endpoint for endpoint in ENDPOINTS}
    wanted = (
        ()
        if platform is None
        else (("GET", "/ping", platform.ready_path), ("POST", "/invocations", platform.predict_path))
    )
    for method, path, theirs in wanted:
        if theirs is not None and (method, theirs) not in own:
            yield replace(own[method, path], path=theirs)


ENDPOINTS = (*_OWN, *_azure())
