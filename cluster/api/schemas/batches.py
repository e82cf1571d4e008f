"""Bodies and responses of /v1/files and /v1/batches: the upload form, the body that creates a batch, file and batch objects.

Knows OpenAI's formats. The store's own records are in cluster/batch/records.py.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from cluster.batch.records import BatchEndpoint, BatchRecord, BatchStatus, FileRecord

MAX_FILES_PER_PAGE = 10_000
MAX_BATCHES_PER_PAGE = 100
DEFAULT_BATCHES_PER_PAGE = 20
MAX_METADATA_PAIRS = 16

# OpenAI's bounds: one hour to 30 days.
MIN_LIFETIME_S = 3600
MAX_LIFETIME_S = 2_592_000
Lifetime = Annotated[int, Meta(ge=MIN_LIFETIME_S, le=MAX_LIFETIME_S)]


class ExpiresAfter(Struct, frozen=True, kw_only=True):
    """The file is deleted `seconds` after it was created."""

    anchor: Literal["created_at"]
    seconds: Lifetime


class FileUpload(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A form (multipart/form-data). `expires_after`: JSON, or two fields, `expires_after[anchor]` and `expires_after[seconds]`."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]
    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


class FileObject(Struct, frozen=True, kw_only=True):
    """OpenAI's fields, and from `sample_type` on those that Mistral's client requires."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None
    object: str = "file"
    status: str = "processed"
    status_details: None = None
    sample_type: Literal["batch_request", "batch_result"]
    source: Literal["upload"] = "upload"
    deleted: bool = False


class FileList(Struct, frozen=True, kw_only=True):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class FileDeleted(Struct, frozen=True, kw_only=True):
    id: str
    deleted: bool = True
    object: str = "file"


class BatchRequest(Struct, frozen=True, kw_only=True):
    """`completion_window`: a number with a unit (s, m, h or d). Lines that are not answered by then expire."""

    input_file_id: str
    endpoint: BatchEndpoint
    completion_window: str
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=MAX_METADATA_PAIRS),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(Struct, frozen=True, kw_only=True):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(Struct, frozen=True, kw_only=True):
    data: list[BatchError]
    object: str = "list"


class RequestCounts(Struct, frozen=True, kw_only=True):
    total: int
    completed: int
    failed: int


class InputTokensDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int


class OutputTokensDetails(Struct, frozen=True, kw_only=True):
    reasoning_tokens: int = 0


class BatchUsage(Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()


class Batch(Struct, frozen=True, kw_only=True):
    """`usage` and `request_counts` grow while the batch runs."""

    id: str
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    object: str = "batch"


class BatchList(Struct, frozen=True, kw_only=True):
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


def file_object(record: FileRecord) -> FileObject:
    """The file as the API shows it."""
    return FileObject(
        id=record.id,
        bytes=record.num_bytes,
        created_at=record.created_at,
        filename=record.filename,
        purpose=record.purpose,
        expires_at=record.expires_at,
        sample_type="batch_request" if record.purpose == "batch" else "batch_result",
    )


def batch_object(record: BatchRecord) -> Batch:
    """The batch as the API shows it."""
    fields = {name: getattr(record, name) for name in Batch.__struct_fields__ if hasattr(record, name)}
    fields["errors"] = (
        BatchErrors(
            data=[BatchError(code=e.code, message=e.message, param=e.param, line=e.line) for e in record.errors]
        )
        if record.errors
        else None
    )
    return Batch(
        **fields,
        request_counts=RequestCounts(total=record.num_lines, completed=record.num_completed, failed=record.num_failed),
        usage=BatchUsage(
            input_tokens=record.num_prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=record.num_cached_tokens),
            output_tokens=record.num_output_tokens,
            total_tokens=record.num_prompt_tokens + record.num_output_tokens,
        ),
    )
