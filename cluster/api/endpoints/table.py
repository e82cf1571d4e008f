"""The table of endpoints: what the router serves and what /openapi.json says come from the same rows, so neither can be forgotten.

Knows every endpoint's path, types and statuses. The web page's files are not in it (pages.py).
"""

from cluster.api.endpoints import chat, completions, embeddings, models, moderations, openapi, tokens
from cluster.api.endpoints.batches import batches, files
from cluster.api.endpoints.endpoint import Endpoint
from cluster.api.endpoints.operator import admin, debug, health, version
from cluster.api.schemas import batches as batch_schemas
from cluster.api.schemas import other
from cluster.api.schemas.chat import ChatChunk, ChatCompletion, ChatRequest
from cluster.api.schemas.completions import Completion, CompletionRequest

BODY_ERRORS = (400, 408, 413, 415)
MODEL_ERRORS = (403, 404)
RUN_ERRORS = (429, 500, 503, 504)
STORE_ERRORS = (400, 404, 503)


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/completions",
        handler=completions.handle,
        summary="Continue a prompt.",
        body=CompletionRequest,
        answer=Completion,
        chunk=Completion,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/chat/completions",
        handler=chat.handle,
        summary="Answer a conversation.",
        body=ChatRequest,
        answer=ChatCompletion,
        chunk=ChatChunk,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/embeddings",
        handler=embeddings.handle,
        summary="Embed texts: the mean of the last hidden states.",
        body=other.EmbeddingRequest,
        answer=other.EmbeddingList,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/moderations",
        handler=moderations.handle,
        summary="Let the model judge texts by Mistral's 13 categories.",
        body=other.ModerationRequest,
        answer=other.ModerationAnswer,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="GET",
        path="/v1/models",
        handler=models.list_models,
        summary="The served names.",
        answer=other.ModelList,
    ),
    Endpoint(
        method="GET",
        path="/v1/models/{model:.+}",
        handler=models.get_model,
        summary="One served name.",
        answer=other.ModelCard,
        errors=(404,),
    ),
    Endpoint(
        method="POST",
        path="/tokenize",
        handler=tokens.tokenize,
        summary="A prompt's or a conversation's token ids.",
        body=other.TokenizeRequest,
        answer=other.TokenizeAnswer,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 429, 503),
    ),
    Endpoint(
        method="POST",
        path="/detokenize",
        handler=tokens.detokenize,
        summary="The text of token ids.",
        body=other.DetokenizeRequest,
        answer=other.DetokenizeAnswer,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 429, 503),
    ),
    Endpoint(
        method="POST",
        path="/v1/files",
        handler=files.create,
        summary="Upload a file of requests for a batch.",
        form=batch_schemas.FileUpload,
        answer=batch_schemas.FileObject,
        errors=(*BODY_ERRORS, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/files",
        handler=files.list_files,
        summary="Files, by their time.",
        answer=batch_schemas.FileList,
        query=("after", "limit", "order", "purpose"),
        errors=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/files/{file_id}",
        handler=files.get,
        summary="What is known of a file.",
        answer=batch_schemas.FileObject,
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="GET",
        path="/v1/files/{file_id}/content",
        handler=files.content,
        summary="A file itself.",
        content_type="application/octet-stream",
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/files/{file_id}",
        handler=files.delete,
        summary="Delete a file that no running batch reads.",
        answer=batch_schemas.FileDeleted,
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="POST",
        path="/v1/batches",
        handler=batches.create,
        summary="Answer every line of a file, behind whatever else is asked.",
        body=batch_schemas.BatchRequest,
        answer=batch_schemas.Batch,
        errors=(*BODY_ERRORS, 404, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/batches",
        handler=batches.list_batches,
        summary="Batches, the youngest first.",
        answer=batch_schemas.BatchList,
        query=("after", "limit"),
        errors=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/batches/{batch_id}",
        handler=batches.get,
        summary="How far a batch is.",
        answer=batch_schemas.Batch,
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="POST",
        path="/v1/batches/{batch_id}/cancel",
        handler=batches.cancel,
        summary="End a batch; what is answered stays.",
        answer=batch_schemas.Batch,
        errors=(*BODY_ERRORS, 404, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/version",
        handler=version.handle,
        summary="The server's release.",
        answer=other.VersionAnswer,
    ),
    Endpoint(
        method="GET",
        path="/health",
        handler=health.handle,
        summary="Whether a request sent now would be served.",
        answer=health.HealthAnswer,
        errors=(503,),
    ),
    Endpoint(
        method="GET",
        path="/health/ready",
        handler=health.handle,
        summary="The same as /health.",
        answer=health.HealthAnswer,
        errors=(503,),
    ),
    Endpoint(
        method="GET",
        path="/health/live",
        handler=health.live,
        summary="Whether the server runs.",
        answer=health.LiveAnswer,
        is_open=True,
    ),
    Endpoint(
        method="GET",
        path="/metrics",
        handler=health.metrics,
        summary="Prometheus metrics.",
        content_type="text/plain",
    ),
    Endpoint(
        method="GET",
        path="/openapi.json",
        handler=openapi.handle,
        summary="This document.",
    ),
    Endpoint(
        method="GET",
        path="/debug/route",
        handler=debug.handle,
        summary="Where a prompt would go now, and why.",
        query=("prompt", "prompt_token_ids", "policy"),
        errors=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/admin/cluster",
        handler=admin.cluster,
        summary="Replicas, ranks, nodes and gateways.",
        errors=(404, 503),
    ),
    Endpoint(
        method="POST",
        path="/admin/replicas/{replica_id}/drain",
        handler=admin.drain,
        summary="Take a replica out of service without losing a stream.",
        body=admin.DrainRequest,
        success=202,
        errors=(*BODY_ERRORS, 404, 503),
    ),
)
