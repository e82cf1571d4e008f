"""/v1/files: upload, list, retrieve, download and delete the files of batches.

Knows responses and who may see a file; upload_form.py reads the form. Records are in the store, contents in FileContents.
"""

import re
import time

from aiohttp import hdrs, web

from cluster.api.context import CONTEXT
from cluster.api.endpoints.batches.access import (
    batches_of,
    check_query,
    find_file,
    owner_of,
    page_after,
    page_limit,
    view_of,
)
from cluster.api.endpoints.batches.upload_form import read_form
from cluster.api.generation.answering import json_response
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.schemas.batches import (
    MAX_FILES_PER_PAGE,
    FileDeleted,
    FileList,
    file_object,
)
from cluster.api.server.errors import NotFoundError
from cluster.batch.records import FileRecord, new_file_id
from workers.errors import RequestError

PURPOSES = ("batch", "batch_output")


async def create(request: web.Request) -> web.Response:
    """Stores the uploaded file. It exists completely or not at all."""
    api, batches = request.app[CONTEXT], batches_of(request)
    file_id = new_file_id()
    try:
        form = await read_form(request, batches.files, file_id, timeout_s=api.body_timeout_s)
        api.ignore(request[REQUEST_CONTEXT], **dict.fromkeys(form.ignored, ""))
    except BaseException:
        await batches.files.delete(file_id)
        raise
    now = int(time.time())
    record = FileRecord(
        id=file_id,
        filename=form.filename,
        purpose="batch",
        num_bytes=form.num_bytes,
        created_at=now,
        expires_at=None if form.expires_after_s is None else now + form.expires_after_s,
        owner=owner_of(request),
    )
    await batches.store.add_file(record)  # if this fails, the batch service deletes the contents later
    return json_response(file_object(record))


async def list_files(request: web.Request) -> web.Response:
    """One page, newest first by default."""
    batches = batches_of(request)
    check_query(request, "after", "limit", "order", "purpose", "page", "page_size", "include_total")
    limit = page_limit(request, default=MAX_FILES_PER_PAGE, most=MAX_FILES_PER_PAGE)
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(
            f"'order' is {order[:20]!r}.", remedy="Send 'asc' or 'desc'.", param="order", code="invalid_value"
        )
    purpose = request.query.get("purpose")
    records: list[FileRecord] = []
    if purpose is None or purpose in PURPOSES:
        records = await batches.store.list_files(
            owner=view_of(request),
            purpose=purpose,
            after=page_after(request),
            limit=limit + 1,
            order="asc" if order == "asc" else "desc",
        )
    shown = [file_object(record) for record in records[:limit]]
    return json_response(
        FileList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(records) > limit,
        )
    )


async def get(request: web.Request) -> web.Response:
    """The file's metadata."""
    return json_response(file_object(await find_file(request, request.match_info["file_id"])))


async def content(request: web.Request) -> web.StreamResponse:
    """The file's contents, or a range of them."""
    record = await find_file(request, request.match_info["file_id"])
    path = batches_of(request).files.path(record.id)
    if not path.is_file():
        raise NotFoundError("The contents of this file no longer exist.", param="file_id", code="file_not_found")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", record.filename)
    headers = {
        hdrs.CONTENT_TYPE: "application/octet-stream",
        hdrs.CONTENT_DISPOSITION: f'attachment; filename="{name}"',
    }
    return web.FileResponse(path, headers=headers)


async def delete(request: web.Request) -> web.Response:
    """Refused while a batch still reads the file."""
    batches = batches_of(request)
    record = await find_file(request, request.match_info["file_id"])
    await batches.store.delete_file(record.id)
    await batches.files.delete(record.id)
    return json_response(FileDeleted(id=record.id))
