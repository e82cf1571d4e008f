"""The rows of /v1/files and /v1/batches in the table of endpoints."""

from cluster.api.endpoints.batches import batches, files
from cluster.api.endpoints.endpoint import BODY_ERRORS, STORE_ERRORS, Endpoint
from cluster.api.schemas import batches as schemas

BATCHES = (
    Endpoint(
        method="POST",
        path="/v1/files",
        handler=files.create,
        summary="Upload a file of requests for a batch.",
        form=schemas.FileUpload,
        response=schemas.FileObject,
        errors=(*BODY_ERRORS, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/files",
        handler=files.list_files,
        summary="List files.",
        response=schemas.FileList,
        query=("after", "limit", "order", "purpose", "page", "page_size", "include_total"),
        errors=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/files/{file_id}",
        handler=files.get,
        summary="Retrieve a file's metadata.",
        response=schemas.FileObject,
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
        response=schemas.FileDeleted,
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="POST",
        path="/v1/batches",
        handler=batches.create,
        summary="Create a batch, which answers every line of a file in the background.",
        body=schemas.BatchRequest,
        response=schemas.Batch,
        errors=(*BODY_ERRORS, 404, 429, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/batches",
        handler=batches.list_batches,
        summary="List batches, newest first.",
        response=schemas.BatchList,
        query=("after", "limit"),
        errors=(400, 503),
    ),
    Endpoint(
        method="GET",
        path="/v1/batches/{batch_id}",
        handler=batches.get,
        summary="Retrieve a batch and its progress.",
        response=schemas.Batch,
        errors=STORE_ERRORS,
    ),
    Endpoint(
        method="POST",
        path="/v1/batches/{batch_id}/cancel",
        handler=batches.cancel,
        summary="Cancel a batch. Lines that were already answered are kept.",
        response=schemas.Batch,
        errors=(*BODY_ERRORS, 404, 429, 503),
    ),
)
