"""The values that batches consist of: files, batches, lines and results, as the store keeps them. Frozen; knows no database and no clock.

Times are Unix seconds. `owner` is the id of the API key that created a file or a batch ("" without keys) and decides who may see it.
The statuses of a batch and their names are OpenAI's: validating -> in_progress -> finalizing -> completed or expired; validating ->
failed when a line is invalid; cancelling -> cancelled.
"""

import hashlib
import re
import uuid
from typing import Literal, get_args

import msgspec

from workers.errors import RequestError

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: tuple[BatchStatus, ...] = ("completed", "failed", "expired", "cancelled")
BatchEndpoint = Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"]
ENDPOINTS: tuple[BatchEndpoint, ...] = get_args(BatchEndpoint)
MAX_REPLICAS_KEY = "max_replicas"  # in a batch's metadata: how many replicas may be added for it at most
MAX_WINDOW_S = 365 * 86_400
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a file; `FileContents` has the contents. `purpose`: "batch" for an input, "batch_output" for a file we generated."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int | None = None
    owner: str = ""


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed before it started, in OpenAI's format. `line` counts from 1; None means the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a batch. Counts grow with every commit of results; `num_lines` is 0 until all lines are known.

    `num_failed` counts lines that ended in an error, and at the end those that expired or were cancelled. `estimated_tokens` covers the
    prompts and answers of all lines, `answered_tokens` the part of that estimate whose lines are answered: the difference is the work
    that remains. `expires_at` is the deadline.
    """

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    owner: str = ""
    status: BatchStatus = "validating"
    model: str | None = None
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
    errors: tuple[LineError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    estimated_tokens: int = 0
    answered_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    # Of the request that created it, if that was traced.
    traceparent: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def num_answered(self) -> int:
        return self.num_completed + self.num_failed

    @property
    def remaining_tokens(self) -> int:
        """An estimate of the prompt and answer tokens that are left."""
        return max(0, self.estimated_tokens - self.answered_tokens)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a batch: where it is in the input file, and what planning and running need to know of it.

    `number` counts the lines of the file from 1, including empty ones. `group_key` is equal for lines whose prompts start alike.
    `num_tokens` estimates prompt and answer. `position` is its place in the order of execution. `crashes` counts the replicas that died
    while they worked on this line, `lone_crashes` those among them that worked on nothing else.
    """

    number: int
    custom_id: str
    offset: int
    num_bytes: int
    group_key: int = 0
    num_tokens: int = 0
    position: int = 0
    crashes: int = 0
    lone_crashes: int = 0


class LineResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a line ended: with an HTTP response (`status_code`, and its JSON in `body`), or with an `error_code` and `error_message`.

    Only status 200 counts as completed. Everything else goes to the error file.
    """

    number: int
    status_code: int | None = None
    request_id: str = ""
    body: bytes = b""
    error_code: str | None = None
    error_message: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def is_completed(self) -> bool:
        return self.status_code == 200


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The right to run a batch. `fence` grows by one with every runner, so that an older one can no longer store anything."""

    batch_id: str
    owner: str
    fence: int


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


def new_batch_id() -> str:
    return f"batch_{uuid.uuid4().hex}"


def line_id(batch_id: str, number: int) -> str:
    """The id of a line's answer."""
    digest = hashlib.blake2b(f"{batch_id}\0{number}".encode(), digest_size=16).hexdigest()
    return f"batch_req_{digest}"


def line_seed(batch_id: str, custom_id: str) -> int:
    """31 bits for a line without a seed of its own, so that it gets the same answer each time it is computed."""
    digest = hashlib.blake2b(f"{batch_id}\0{custom_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def parse_window(text: str) -> int:
    """Seconds of a completion window such as "24h", "90m" or "2d". Raises RequestError."""
    found = re.fullmatch(r"([1-9][0-9]{0,7})([smhd])", text)
    if found is None or int(found[1]) * _UNIT_S[found[2]] > MAX_WINDOW_S:
        raise RequestError(
            f"'completion_window' is {text[:40]!r}, which is not a valid duration.",
            remedy="Write a number and a unit (s, m, h or d) such as '24h', at most 365 days.",
            param="completion_window",
            code="invalid_completion_window",
        )
    return int(found[1]) * _UNIT_S[found[2]]
