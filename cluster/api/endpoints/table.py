"""The table of endpoints. The HTTP router and /openapi.json both come from these rows, so they always agree.

Knows every endpoint's path, types and statuses, and under which paths Azure's clients look for them. The web page's files are not in it
(pages.py).
"""

from collections.abc import Iterator
from dataclasses import replace

from cluster.api.endpoints import chat, completions, embeddings, models, moderations, openapi, tokens
from cluster.api.endpoints.batches import batches, files
from cluster.api.endpoints.endpoint import Endpoint
from cluster.api.endpoints.operator import admin, debug, health, version
from cluster.api.schemas import batches as batch_schemas
from cluster.api.schemas import embeddings as embedding_schemas
from cluster.api.schemas import models as model_schemas
from cluster.api.schemas import moderations as moderation_schemas
from cluster.api.schemas import tokens as token_schemas
from cluster.api.schemas.chat import ChatChunk, ChatCompletion, ChatRequest
from cluster.api.schemas.completions import Completion, CompletionRequest

BODY_ERRORS = (400, 408, 413, 415)
MODEL_ERRORS = (403, 404)
RUN_ERRORS = (429, 500, 503, 504)
STORE_ERRORS = (400, 404, 503)


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
        errors=(503,),
    ),
    Endpoint(
        method="POST",
        path="/v1/files",
        handler=files.create,
        summary="Upload a file of requests for a batch.",
        form=batch_schemas.FileUpload,
        response=batch_schemas.FileObject,
        errors=(*BODY_ERRORS, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/files",
        handler=files.list_files,
        summary="List files.",
        response=batch_schemas.FileList,
        query=("after", "limit", "order", "purpose", "page", "page_size", "include_total"),
        errors=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/files/{file_id}",
        handler=files.get,
        summary="Retrieve a file's metadata.",
        response=batch_schemas.FileObject,
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="GET",
        path="/v1/files/{file_id}/content",
        handler=files.content,
        summary="Download a file's contents.",
        content_type="application/octet-stream",
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/files/{file_id}",
        handler=files.delete,
        summary="Delete a file that no running batch reads.",
        response=batch_schemas.FileDeleted,
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="POST",
        path="/v1/batches",
        handler=batches.create,
        summary="Create a batch, which answers every line of a file in the background.",
        body=batch_schemas.BatchRequest,
        response=batch_schemas.Batch,
        errors=(*BODY_ERRORS, 404, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/batches",
        handler=batches.list_batches,
        summary="List batches, newest first.",
        response=batch_schemas.BatchList,
        query=("after", "limit"),
        errors=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/batches/{batch_id}",
        handler=batches.get,
        summary="Retrieve a batch and its progress.",
        response=batch_schemas.Batch,
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="POST",
        path="/v1/batches/{batch_id}/cancel",
        handler=batches.cancel,
        summary="Cancel a batch. Lines that were already answered are kept.",
        response=batch_schemas.Batch,
        errors=(*BODY_ERRORS, 404, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/version",
        handler=version.handle,
        summary="Get the server's version.",
        response=version.VersionResponse,
    ),
    Endpoint(
        method="GET",
        path="/health",
        handler=health.handle,
        summary="Check whether a request sent now would be served.",
        response=health.HealthResponse,
        errors=(503,),
    ),
    Endpoint(
        method="GET",
        path="/health/ready",
        handler=health.handle,
        summary="Check readiness; the same as /health.",
        response=health.HealthResponse,
        errors=(503,),
    ),
    Endpoint(
        method="GET",
        path="/health/live",
        handler=health.live,
        summary="Check whether the server is running. Needs no API key.",
        response=health.LiveResponse,
        is_open=True,
    ),
    Endpoint(
        method="GET",
        path="/metrics",
        handler=health.metrics,
        summary="Get metrics in the Prometheus text format.",
        content_type="text/plain",
    ),
    Endpoint(
        method="GET",
        path="/openapi.json",
        handler=openapi.handle,
        summary="Get this OpenAPI document.",
    ),
    Endpoint(
        method="GET",
        path="/debug/route",
        handler=debug.handle,
        summary="Show which replica a prompt would be sent to, and why.",
        query=("prompt", "prompt_token_ids", "policy"),
        errors=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/admin/cluster",
        handler=admin.cluster,
        summary="Show the cluster's replicas, ranks, nodes and gateways.",
        errors=(404, 503),
    ),
    Endpoint(
        method="POST",
        path="/admin/replicas/{replica_id}/drain",
        handler=admin.drain,
        summary="Take a replica out of service without interrupting any stream.",
        body=admin.DrainRequest,
        success=202,
        errors=(*BODY_ERRORS, 404, 503),
    ),
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


ENDPOINTS = (*_OWN, *_azure())
