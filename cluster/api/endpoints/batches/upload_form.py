"""Reads the form of an upload (multipart/form-data) as it arrives, writing the file to the disk, however large it is.

Knows the form's fields and their limits; knows no records, no keys and no responses.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from cluster.api.schemas.batches import MAX_LIFETIME_S, MIN_LIFETIME_S, ExpiresAfter
from cluster.api.schemas.parsing.lenient import path_of
from cluster.api.server.errors import HTTPError
from cluster.batch.files import FileContents
from workers.errors import RequestError

CHUNK_BYTES = 256 * 1024
MAX_FIELD_BYTES = 1024
MAX_FIELDS = 8
MAX_FILENAME_CHARS = 255
_EXPIRES_AFTER = re.compile(r"expires_after\[(anchor|seconds)\]")


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A form that was read. `expires_after_s`: None if the file does not expire. `ignored`: the names of fields that have no effect."""

    filename: str
    num_bytes: int
    expires_after_s: int | None
    ignored: list[str]


async def read_form(request: web.Request, files: FileContents, file_id: str, *, timeout_s: float) -> Upload:
    """Stores the form's file under `file_id`. The fields may come in any order.

    timeout_s: for each piece of the body. Raises RequestError for a field that is missing or wrong, HTTPError for a file that is too large
    or arrives too slowly.
    """
    return await _FormReader(request, files, file_id, timeout_s).read()


class _FormReader:
    def __init__(self, request: web.Request, files: FileContents, file_id: str, timeout_s: float) -> None:
        self._request = request
        self._files = files
        self._file_id = file_id
        self._timeout_s = timeout_s
        self._filename = ""
        self._num_bytes = 0
        self._expires_after: Any = None
        self._seen: set[str] = set()
        self._ignored: list[str] = []

    async def read(self) -> Upload:
        with _form_errors():
            reader = await self._request.multipart()
        while (part := await self._next(reader)) is not None:
            name = part.name or ""
            if len(self._seen) >= MAX_FIELDS:
                raise RequestError(
                    f"The form has more than {MAX_FIELDS} fields.", remedy="Send fewer fields.", param=name[:80]
                )
            if name in self._seen:
                raise RequestError(
                    f"The form has the field {name[:80]!r} twice.", remedy="Send it once.", param=name[:80]
                )
            self._seen.add(name)
            await self._read_field(name, part)
        for name in ("file", "purpose"):
            if name not in self._seen:
                raise RequestError(f"You must provide {name!r}.", param=name, code="missing_required_parameter")
        return Upload(
            filename=self._filename,
            num_bytes=self._num_bytes,
            expires_after_s=None if self._expires_after is None else _seconds(self._expires_after),
            ignored=self._ignored,
        )

    async def _read_field(self, name: str, part: BodyPartReader) -> None:
        if name == "file":
            if part.filename is None:
                raise RequestError(
                    "'file' has no filename.", remedy="Send it as a file, with a filename.", param="file"
                )
            self._filename = _clean(part.filename)
            try:
                self._num_bytes = await self._files.write(self._file_id, self._chunks(part))
            except RequestError as e:
                if e.code == "file_too_large":
                    raise HTTPError(413, e.message, remedy=e.remedy, param=e.param, code=e.code) from e
                raise
        elif name == "purpose":
            purpose = await self._text(name, part)
            if purpose != "batch":
                raise RequestError(
                    f"The purpose {purpose[:40]!r} is not supported.",
                    remedy="Send 'batch': all files here are for batches.",
                    param="purpose",
                    code="unsupported_purpose",
                )
        elif found := _EXPIRES_AFTER.fullmatch(name):
            self._expires_after = {**(self._expires_after or {}), found[1]: await self._text(name, part)}
        elif name == "expires_after" and self._expires_after is None:  # the way OpenAPI puts an object into a form
            try:
                self._expires_after = msgspec.json.decode(await self._text(name, part), type=dict[str, Any] | None)
            except msgspec.DecodeError as e:
                raise _wrong_expiry() from e
        elif name == "expiry":
            raise RequestError(
                "'expiry' is not supported.",
                remedy="Send 'expires_after' with a number of seconds.",
                param=name,
                code="unsupported_parameter",
            )
        else:
            await self._text(name, part)
            self._ignored.append(path_of("", name))

    async def _next(self, reader: MultipartReader) -> BodyPartReader | None:
        async with self._timeout():
            with _form_errors():
                part = await reader.next()
        if part is not None and not isinstance(part, BodyPartReader):
            raise RequestError("The form contains another form.", remedy="Send fields only.", code="invalid_form")
        return part

    async def _chunks(self, part: BodyPartReader) -> AsyncIterator[bytes]:
        while True:
            async with self._timeout():
                with _form_errors():
                    chunk = await part.read_chunk(CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    async def _text(self, name: str, part: BodyPartReader) -> str:
        data = b""
        async for chunk in self._chunks(part):
            data += chunk
            if len(data) > MAX_FIELD_BYTES:
                raise RequestError(
                    f"{name!r} is longer than {MAX_FIELD_BYTES} bytes.", remedy="Shorten it.", param=name
                )
        return data.decode("utf-8", "replace")

    @contextlib.asynccontextmanager
    async def _timeout(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError as e:
            raise HTTPError(
                408,
                f"No part of the body arrived for {self._timeout_s:g} s.",
                remedy="Send it faster.",
                code="request_timeout",
            ) from e


@contextlib.contextmanager
def _form_errors() -> Iterator[None]:
    """Turns everything that aiohttp raises for a malformed form into a RequestError."""
    try:
        yield
    except (ValueError, KeyError, AssertionError, RuntimeError, HttpProcessingError) as e:
        raise RequestError(
            "The form is malformed: its parts are broken or incomplete.",
            remedy="Send valid multipart/form-data.",
            code="invalid_form",
        ) from e


def _seconds(fields: dict[str, Any]) -> int:
    """The lifetime in the fields of `expires_after`. Raises RequestError."""
    if fields.keys() - set(ExpiresAfter.__struct_fields__):
        raise _wrong_expiry()
    try:
        return msgspec.convert(fields, ExpiresAfter, strict=False).seconds
    except msgspec.ValidationError as e:
        raise _wrong_expiry() from e


def _wrong_expiry() -> RequestError:
    return RequestError(
        "'expires_after' is invalid.",
        remedy=f"Send the anchor 'created_at' and seconds from {MIN_LIFETIME_S} to {MAX_LIFETIME_S}.",
        param="expires_after",
        code="invalid_value",
    )


def _clean(filename: str) -> str:
    """The name without folders and unprintable characters."""
    name = re.split(r"[/\\]", filename)[-1]
    return "".join(c if c.isprintable() else "_" for c in name)[:MAX_FILENAME_CHARS] or "file"
