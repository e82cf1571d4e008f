"""/v1/files: upload, list, look at, fetch and delete the files of batches.

Knows forms and answers. An upload goes to the disk as it arrives, however large it is; records are the store's, contents the files'.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
from aiohttp import BodyPartReader, MultipartReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from cluster.api.context import GATEWAY, Batches
from cluster.api.endpoints.batches.access import (
    batches_of,
    check_query,
    find_file,
    owner_of,
    page_after,
    page_limit,
    view_of,
)
from cluster.api.generation.answering import json_answer
from cluster.api.schemas.batches import (
    MAX_FILES_AT_ONCE,
    ExpiresAfter,
    FileDeleted,
    FileList,
    file_object,
)
from cluster.api.server.errors import NotFoundError, Refusal
from cluster.batch.records import FileRecord, new_file_id
from workers.errors import RequestError

PURPOSES = ("batch", "batch_output")
CHUNK_BYTES = 256 * 1024
MAX_FIELD_BYTES = 1024
MAX_FIELDS = 8
MAX_FILENAME_CHARS = 255
_EXPIRES_AFTER = re.compile(r"expires_after\[(anchor|seconds)\]")


async def create(request: web.Request) -> web.Response:
    """Stores what the form holds. The file is there whole or not at all."""
    batches = batches_of(request)
    file_id = new_file_id()
    try:
        form = await _Form(request, batches, file_id).read()
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
    await batches.store.add_file(record)  # if it fails the contents are a stray, which the service sweeps away
    return json_answer(file_object(record))


async def list_files(request: web.Request) -> web.Response:
    """A page of them, the youngest first unless asked otherwise."""
    batches = batches_of(request)
    check_query(request, "after", "limit", "order", "purpose")
    limit = page_limit(request, default=MAX_FILES_AT_ONCE, most=MAX_FILES_AT_ONCE)
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("'order' must be 'asc' or 'desc'.", param="order", code="invalid_value")
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
    return json_answer(
        FileList(
            data=shown,
            first_id=shown[0].id if shown else None,
            last_id=shown[-1].id if shown else None,
            has_more=len(records) > limit,
        )
    )


async def get(request: web.Request) -> web.Response:
    """One file's facts."""
    return json_answer(file_object(await find_file(request, request.match_info["file_id"])))


async def content(request: web.Request) -> web.StreamResponse:
    """The bytes themselves, or a range of them."""
    record = await find_file(request, request.match_info["file_id"])
    path = batches_of(request).files.path(record.id)
    if not path.is_file():
        raise NotFoundError("The contents of this file are gone.", param="file_id", code="file_not_found")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", record.filename)
    headers = {
        hdrs.CONTENT_TYPE: "application/octet-stream",
        hdrs.CONTENT_DISPOSITION: f'attachment; filename="{name}"',
    }
    return web.FileResponse(path, headers=headers)


async def delete(request: web.Request) -> web.Response:
    """Refused while a batch that has not ended reads it."""
    batches = batches_of(request)
    record = await find_file(request, request.match_info["file_id"])
    await batches.store.delete_file(record.id)
    await batches.files.delete(record.id)
    return json_answer(FileDeleted(id=record.id))


class _Form:
    """An upload's fields, in any order. `read` once; then the attributes say what was sent."""

    def __init__(self, request: web.Request, batches: Batches, file_id: str) -> None:
        self.filename = ""
        self.num_bytes = 0
        self.expires_after_s: int | None = None
        self._request = request
        self._batches = batches
        self._file_id = file_id
        self._patience_s = request.app[GATEWAY].body_timeout_s
        self._expires_after: Any = None
        self._seen: set[str] = set()

    async def read(self) -> "_Form":
        """Raises RequestError for a field that is missing, wrong or unknown; Refusal for a file that is too large or too slow."""
        with _broken_form():
            reader = await self._request.multipart()
        while (part := await self._next(reader)) is not None:
            name = part.name or ""
            if name in self._seen or len(self._seen) >= MAX_FIELDS:
                raise RequestError(f"The form has the field {name[:80]!r} twice.", param=name[:80])
            self._seen.add(name)
            await self._take(name, part)
        for name in ("file", "purpose"):
            if name not in self._seen:
                raise RequestError(f"You must provide {name!r}.", param=name, code="missing_required_parameter")
        if self._expires_after is not None:
            self.expires_after_s = _seconds(self._expires_after)
        return self

    async def _take(self, name: str, part: BodyPartReader) -> None:
        if name == "file":
            if part.filename is None:
                raise RequestError("'file' must be sent as a file, with a filename.", param="file")
            self.filename = _clean(part.filename)
            try:
                self.num_bytes = await self._batches.files.write(self._file_id, self._chunks(part))
            except RequestError as e:
                if e.code == "file_too_large":
                    raise Refusal(413, str(e), code=e.code) from e
                raise
        elif name == "purpose":
            purpose = await self._text(name, part)
            if purpose != "batch":
                raise RequestError(
                    f"The purpose {purpose[:40]!r} is not supported; files here are for batches: send 'batch'.",
                    param="purpose",
                    code="unsupported_purpose",
                )
        elif found := _EXPIRES_AFTER.fullmatch(name):
            self._expires_after = {**(self._expires_after or {}), found[1]: await self._text(name, part)}
        elif name == "expires_after" and self._expires_after is None:  # as OpenAPI has an object in a form
            try:
                self._expires_after = msgspec.json.decode(await self._text(name, part), type=dict[str, Any] | None)
            except msgspec.DecodeError as e:
                raise _wrong_expiry() from e
        else:
            raise RequestError(
                f"Unrecognized request argument supplied: {name[:80]}", param=name[:80], code="unknown_parameter"
            )

    async def _next(self, reader: MultipartReader) -> BodyPartReader | None:
        async with self._patience():
            with _broken_form():
                part = await reader.next()
        if part is not None and not isinstance(part, BodyPartReader):
            raise RequestError("The form holds another form; send fields only.", code="invalid_form")
        return part

    async def _chunks(self, part: BodyPartReader) -> AsyncIterator[bytes]:
        while True:
            async with self._patience():
                with _broken_form():
                    chunk = await part.read_chunk(CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    async def _text(self, name: str, part: BodyPartReader) -> str:
        data = b""
        async for chunk in self._chunks(part):
            data += chunk
            if len(data) > MAX_FIELD_BYTES:
                raise RequestError(f"{name!r} is too long.", param=name)
        return data.decode("utf-8", "replace")

    @contextlib.asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._patience_s):
                yield
        except TimeoutError as e:
            raise Refusal(
                408,
                f"Nothing of the body arrived for {self._patience_s:g} s; send it faster.",
                code="request_timeout",
            ) from e


@contextlib.contextmanager
def _broken_form() -> Iterator[None]:
    """What aiohttp raises for a form that is none, of whatever kind."""
    try:
        yield
    except (ValueError, KeyError, AssertionError, RuntimeError, HttpProcessingError) as e:
        raise RequestError(
            "The body is no form that this server understands: its parts are broken or incomplete.", code="invalid_form"
        ) from e


def _seconds(fields: dict[str, Any]) -> int:
    """Of expires_after's two fields. Raises RequestError."""
    try:
        return msgspec.convert(fields, ExpiresAfter, strict=False).seconds
    except msgspec.ValidationError as e:
        raise _wrong_expiry() from e


def _wrong_expiry() -> RequestError:
    return RequestError(
        "'expires_after' needs an 'anchor', which is 'created_at', and 'seconds' from 3600 to 2592000.",
        param="expires_after",
        code="invalid_value",
    )


def _clean(filename: str) -> str:
    """Without folders and characters that no name has."""
    name = re.split(r"[/\\]", filename)[-1]
    return "".join(c if c.isprintable() else "_" for c in name)[:MAX_FILENAME_CHARS] or "file"
