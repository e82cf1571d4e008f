"""A batch's output and error files, written from the stored results in line order. Streams a few megabytes at a time.

The files have OpenAI's format: an answer with status 200 goes to the output file; any other status, and a line without an answer, goes to
the error file. Complete files are renamed into place, under ids that no other runner of the batch uses. A file that a crash cut off is
written again from the same results, byte for byte.
"""

import hashlib
from contextlib import AsyncExitStack
from typing import Literal

import msgspec

from cluster.batch.files import FileContents, NewFile
from cluster.batch.records import BatchRecord, FileRecord, Lease, Line, LineResult, line_id
from cluster.batch.store.interface import Store

MAX_PAGE_LINES = 128
PAGE_BYTES = 8 * 1024 * 1024  # of answers read at once, if the next ones are about as long as the last ones
BUFFER_BYTES = 1024 * 1024
Kind = Literal["output", "error"]
_NOT_RUN = {
    "cancelled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
    "expired": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
}


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Error(msgspec.Struct, frozen=True):
    code: str
    message: str


class _OutputLine(msgspec.Struct, frozen=True):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None


_encoder = msgspec.json.Encoder()


async def write_output(
    store: Store, files: FileContents, *, lease: Lease, batch: BatchRecord, now: float
) -> tuple[FileRecord | None, FileRecord | None]:
    """Returns the records of the output and the error file, None for a file that would be empty. Does not store them.

    `batch` must accept no more results. Raises StoreError when a file cannot be written; the store still has all the results then.
    """
    async with AsyncExitStack() as stack:
        output = _Sink(files, file_id(lease, "output"), stack)
        errors = _Sink(files, file_id(lease, "error"), stack)
        after, num_lines = 0, 8
        while page := await store.answered(batch.id, after=after, limit=num_lines):
            for line, result in page:
                sink = output if result is not None and result.is_completed else errors
                sink.add(render(batch, line, result))
            await output.flush(BUFFER_BYTES)
            await errors.flush(BUFFER_BYTES)
            after = page[-1][0].number
            mean_bytes = 1 + sum(len(result.body) for _, result in page if result is not None) // len(page)
            num_lines = max(1, min(MAX_PAGE_LINES, PAGE_BYTES // mean_bytes))
        await output.commit()
        await errors.commit()
    return output.record(batch, "output", now=now), errors.record(batch, "error", now=now)


def render(batch: BatchRecord, line: Line, result: LineResult | None) -> bytes:
    """One line of either file, with its newline. A line without a result was not run before the batch ended."""
    response, error = None, None
    if result is None:
        error = _Error(*_NOT_RUN["cancelled" if batch.status == "cancelling" else "expired"])
    else:
        if result.status_code is not None:
            response = _Response(result.status_code, result.request_id, msgspec.Raw(result.body or b"null"))
        if result.error_code is not None:
            error = _Error(result.error_code, result.error_message or "")
    return _encoder.encode(_OutputLine(line_id(batch.id, line.number), line.custom_id, response, error)) + b"\n"


def file_id(lease: Lease, kind: Kind) -> str:
    """The id of the file that this runner writes. The fence in it keeps a stale runner from overwriting its successor's file."""
    digest = hashlib.blake2b(f"{lease.batch_id}\0{lease.fence}\0{kind}".encode(), digest_size=16).hexdigest()
    return f"file-{digest}"


class _Sink:
    """A file that is created with the first write."""

    def __init__(self, files: FileContents, file_id: str, stack: AsyncExitStack) -> None:
        self._files = files
        self._id = file_id
        self._stack = stack
        self._new: NewFile | None = None
        self._buffer = bytearray()

    def add(self, data: bytes) -> None:
        self._buffer += data

    async def flush(self, at_least: int = 1) -> None:
        if len(self._buffer) < at_least:
            return
        if self._new is None:
            self._new = await self._stack.enter_async_context(self._files.create(self._id))
        data, self._buffer = bytes(self._buffer), bytearray()
        await self._new.write(data)

    async def commit(self) -> None:
        await self.flush()
        if self._new is not None:
            await self._new.commit()

    def record(self, batch: BatchRecord, kind: Kind, *, now: float) -> FileRecord | None:
        if self._new is None:
            return None
        expires_after_s = batch.output_expires_after_s
        return FileRecord(
            id=self._id,
            filename=f"{batch.id}_{kind}.jsonl",
            purpose="batch_output",
            num_bytes=self._new.num_bytes,
            created_at=int(now),
            expires_at=None if expires_after_s is None else int(now) + expires_after_s,
            owner=batch.owner,
        )
