"""The values batches are made of: files, batches, lines, results, as they lie in the store. Frozen; knows no database and no clock.

Times are Unix seconds. `owner` is the id of the key that made a file or a batch, "" without keys: who may see it. A batch's statuses and
what they are called are OpenAI's: validating -> in_progress -> finalizing -> completed or expired; failed when a line is wrong; cancelling
-> cancelled.
"""

import hashlib
import re
import uuid
from typing import Literal

import msgspec

from workers.errors import RequestError

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: tuple[BatchStatus, ...] = ("completed", "failed", "expired", "cancelled")
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
MAX_REPLICAS_KEY = "max_replicas"  # in a batch's metadata: most replicas that may be added for its sake
MAX_WINDOW_S = 365 * 86_400
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file's facts; its contents are `FileContents`'. `purpose`: "batch", or "batch_output" for one we made."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int | None = None
    owner: str = ""


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed before it started, as OpenAI words it. `line` counts from 1; None for the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch's state. Counts grow with every commit of results; `num_lines` is 0 until all lines are known.

    `num_failed` counts lines that ended in an error, at the end also those that expired or were cancelled. `estimated_tokens`: of all
    lines, prompt and answer; `answered_tokens`: the part of that estimate whose lines are answered, so that the difference is what is
    left to do. `expires_at` is the deadline.
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

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def num_answered(self) -> int:
        return self.num_completed + self.num_failed

    @property
    def remaining_tokens(self) -> int:
        """An estimate, of prompts and answers not yet answered."""
        return max(0, self.estimated_tokens - self.answered_tokens)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a batch: where it lies in the input file, and what planning and running need of it.

    `number` counts the file's lines from 1, empty ones too. `group_key`: equal for lines whose prompts open alike. `num_tokens`: an
    estimate, prompt and answer. `position`: its place in the order of running. `crashes`: replicas that died while they worked on it, and
    `lone_crashes`: those of them that worked on nothing else.
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
    """How a line ended. Either an HTTP answer (`status_code`, and `body`: its JSON), or an `error_code` and a sentence.

    Only status 200 counts as completed; everything else goes to the error file.
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
    """The right to run a batch. `fence` grows with every runner the batch has had: an older one can no longer store anything."""

    batch_id: str
    owner: str
    fence: int


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


def new_batch_id() -> str:
    return f"batch_{uuid.uuid4().hex}"


def line_id(batch_id: str, number: int) -> str:
    """Of a line's answer."""
    digest = hashlib.blake2b(f"{batch_id}\0{number}".encode(), digest_size=16).hexdigest()
    return f"batch_req_{digest}"


def line_seed(batch_id: str, custom_id: str) -> int:
    """31 bits for a line that brings no seed, so that computed twice it has the same answer."""
    digest = hashlib.blake2b(f"{batch_id}\0{custom_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def parse_window(text: str) -> int:
    """Seconds of a completion window: "24h", "90m", "2d". Raises RequestError."""
    found = re.fullmatch(r"([1-9][0-9]{0,7})([smhd])", text)
    if found is None or int(found[1]) * _UNIT_S[found[2]] > MAX_WINDOW_S:
        raise RequestError(
            f"'completion_window' is {text[:40]!r}; write a number and a unit (s, m, h or d) such as '24h', at most 365 days.",
            param="completion_window",
            code="invalid_completion_window",
        )
    return int(found[1]) * _UNIT_S[found[2]]
