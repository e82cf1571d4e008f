"""/v1/batches: create a batch from an uploaded file, list and retrieve batches, cancel one.

Knows bodies and responses. Here a batch is a record in the store; cluster/batch runs it.
"""

import time

from aiohttp import web

from cluster.api.context import CONTEXT
from cluster.api.endpoints.batches.access import (
    batches_of,
    check_query,
    find_batch,
    find_file,
    owner_of,
    page_after,
    page_limit,
    view_of,
)
from cluster.api.endpoints.embeddings import NO_EMBEDDINGS
from cluster.api.generation.answering import json_response
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.schemas.batches import (
    DEFAULT_BATCHES_PER_PAGE,
    MAX_BATCHES_PER_PAGE,
    BatchList,
    BatchRequest,
    batch_object,
)
from cluster.api.server.body import read_body, take_body
from cluster.batch.records import BatchRecord, new_batch_id, parse_window
from workers.errors import RequestError


async def create(request: web.Request) -> web.Response:
    """Adds the batch; it is validated and run in the background."""
    batches = batches_of(request)
    body = await read_body(request, BatchRequest)
    window_s = parse_window(body.completion_window)
    if body.endpoint == "/v1/embeddings" and not request.app[CONTEXT].serves_embeddings:
        raise RequestError(
            NO_EMBEDDINGS,
            param="endpoint",
            code="embeddings_disabled",
        )
    file = await find_file(request, body.input_file_id, param="input_file_id")
    if file.purpose != "batch":
        raise RequestError(
            f"The file {file.id!r} has the purpose {file.purpose!r}, not 'batch'.",
            remedy="Upload the input file with the purpose 'batch'.",
            param="input_file_id",
            code="invalid_purpose",
        )
    now = int(time.time())
    record = BatchRecord(
        id=new_batch_id(),
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + window_s,
        owner=owner_of(request),
        metadata=body.metadata,
        output_expires_after_s=None if body.output_expires_after is None else body.output_expires_after.seconds,
        traceparent=request[REQUEST_CONTEXT].traceparent,
    )
    await batches.store.add_batch(record)
    batches.wake()
    return json_response(batch_object(record))


async def list_batches(request: web.Request) -> web.Response:
    """One page, newest first."""
    batches = batches_of(request)
    check_query(request, "after", "limit")
    limit = page_limit(request, default=DEFAULT_BATCHES_PER_PAGE, most=MAX_BATCHES_PER_PAGE)
    records = await batches.store.list_batches(owner=view_of(request), after=page_after(request), limit=limit + 1)
    shown = [batch_object(record) for record in records[:limit]]
    return json_response(
        BatchList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(records) > limit,
        )
    )


async def get(request: web.Request) -> web.Response:
    """The batch and its progress."""
    return json_response(batch_object(await find_batch(request)))


async def cancel(request: web.Request) -> web.Response:
    """Requests the cancellation. The batch is cancelled a moment later; its files have the lines answered by then."""
    batches = batches_of(request)
    if take_body(request) not in (b"", b"{}"):
        raise RequestError("A cancellation has no body.", remedy="Send an empty body.", code="invalid_value")
    found = await find_batch(request)
    if found.has_ended:
        raise RequestError(
            f"The batch is {found.status} and can no longer be cancelled.", param="batch_id", code="batch_ended"
        )
    record = await batches.store.cancel_batch(found.id, now=time.time())
    batches.wake()
    return json_response(batch_object(record or found))
