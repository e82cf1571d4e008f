"""Reads a batch's input file, one request per line, and checks it before anything runs. Streams a few hundred lines at a time.

Knows the format of OpenAI's lines and of their errors; the executor decides whether a body can be answered (`check`). Also derives what
planning needs: which lines start alike, and about how many tokens each costs. Both come straight from the JSON, without a tokenizer.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec

from cluster.batch.records import Line, LineError
from workers.errors import RequestError

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_LINES = 5_000_000
MAX_ERRORS = 200  # per file; reading stops there
MAX_CUSTOM_ID_CHARS = 512
CHUNK_LINES = 500
# A computing thread keeps the event loop from the interpreter for 5 ms at a time, which would slow online requests.
PAUSE_LINES, PAUSE_S = 20, 1e-5
CHUNK_BYTES = 4 * 1024 * 1024
GROUP_BYTES = 256  # of a prompt's JSON that are compared; shorter common prefixes are not worth grouping
BYTES_PER_TOKEN = 4
# Of an answer whose body sets no limit.
DEFAULT_OUTPUT_TOKENS = {"/v1/completions": 16, "/v1/embeddings": 0}
OTHER_OUTPUT_TOKENS = 256


class _Request(msgspec.Struct, frozen=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct, frozen=True):
    """The fields of a body that planning reads. Untyped, because the body may still be invalid."""

    model: Any = None
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None

    @property
    def prompt_parts(self) -> tuple[msgspec.Raw, ...]:
        """In the order of the prompt."""
        return self.system, self.instructions, self.prompt, self.messages, self.input


_request = msgspec.json.Decoder(_Request)
_body = msgspec.json.Decoder(_Body)


@dataclass
class Scan:
    """A chunk of a file: its valid lines, and an error for each invalid one."""

    lines: list[Line] = field(default_factory=list)
    errors: list[LineError] = field(default_factory=list)
    num_bytes: int = 0
    models: set[str] = field(default_factory=set)


def scan(
    source: BinaryIO,
    *,
    endpoint: str,
    check: Callable[[str, bytes], str],
    max_line_bytes: int = MAX_LINE_BYTES,
    max_lines: int = MAX_LINES,
) -> Iterator[Scan]:
    """Yields the file in chunks, in order. Stops early at the line that exceeds `max_lines`. `check`: see LineExecutor."""
    chunk, num_lines = Scan(), 0
    for number, offset, data in _split(source, max_line_bytes):
        num_lines += 1
        if num_lines % PAUSE_LINES == 0:
            time.sleep(PAUSE_S)
        if num_lines > max_lines:
            message = f"The file has more than {max_lines:,} requests. Split it into several batches."
            chunk.errors.append(LineError(code="too_many_requests", message=message, line=number))
            break
        if data is None:
            message = f"This line is longer than the limit of {max_line_bytes:,} bytes."
            chunk.errors.append(LineError(code="line_too_long", message=message, line=number))
        else:
            _read(data, number, offset, endpoint, check, chunk)
            chunk.num_bytes += len(data)
        if len(chunk.lines) + len(chunk.errors) >= CHUNK_LINES or chunk.num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk = Scan()
    if num_lines == 0:
        message = "The batch input file is empty. Please ensure that the batch contains at least one request."
        chunk.errors.append(LineError(code="empty_file", message=message))
    yield chunk


def body_of(data: bytes) -> bytes:
    """The body of a valid line."""
    return bytes(_request.decode(data).body)


def duplicate_error(line: Line) -> LineError:
    """The error for a line that repeats the custom_id of an earlier one."""
    message = (
        f"The custom_id {line.custom_id[:80]!r} of this request is a duplicate of another request's. "
        "The custom_id parameter must be unique for each request in a batch."
    )
    return LineError(code="duplicate_custom_id", message=message, line=line.number, param="custom_id")


def estimate_tokens(endpoint: str, body: _Body) -> int:
    """Prompt and answer together. Token ids are counted, text goes by its length, and an answer counts with its maximum length."""
    prompt = sum(_num_prompt_tokens(memoryview(raw)) for raw in body.prompt_parts)
    limits = (body.max_completion_tokens, body.max_output_tokens, body.max_tokens)
    wanted = next((limit for limit in limits if limit is not None), None)
    default = DEFAULT_OUTPUT_TOKENS.get(endpoint, OTHER_OUTPUT_TOKENS)
    output = wanted if isinstance(wanted, int) and wanted >= 0 else default
    copies = body.n if isinstance(body.n, int) and body.n > 0 else 1
    return prompt + min(output, 1_000_000) * min(copies, 1000)


def group_key(body: _Body) -> int:
    """A signed 64-bit number, equal for prompts of the same model that start alike."""
    parts = (bytes(memoryview(raw)[:GROUP_BYTES]) for raw in body.prompt_parts)
    prefix = b"\0".join(part for part in parts if part)[:GROUP_BYTES]
    digest = hashlib.blake2b(prefix, digest_size=8, key=str(body.model).encode()[:64]).digest()
    return int.from_bytes(digest, "big", signed=True)


def _split(source: BinaryIO, max_line_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields (number, offset, line without its newline) for each non-empty line; the line is None when it is too long."""
    number = offset = 0
    while raw := source.readline(max_line_bytes + 1):
        number, start = number + 1, offset
        offset += len(raw)
        if len(raw) > max_line_bytes and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = source.readline(max_line_bytes)
                offset += len(raw)
            yield number, start, None
            continue
        if number == 1 and raw.startswith(b"\xef\xbb\xbf"):  # the byte-order mark that Windows editors write
            raw, start = raw[3:], start + 3
        data = raw.rstrip()
        if data:
            yield number, start, data


def _read(
    data: bytes, number: int, offset: int, endpoint: str, check: Callable[[str, bytes], str], chunk: Scan
) -> None:
    try:
        if not data.isascii():
            data.decode()  # the decoder below leaves the body raw and would not notice invalid UTF-8 in it
        request = _request.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):  # DecodeError includes ValidationError
        chunk.errors.append(_diagnose(data, number))
        return
    error = _check_envelope(request, number, endpoint)
    if error is None:
        body = bytes(request.body)
        try:
            chunk.models.add(check(endpoint, body))
            planned = _body.decode(body)
        except RequestError as e:
            error = LineError(code=e.code or "invalid_request", message=str(e), line=number, param=e.param)
        except msgspec.DecodeError:
            error = LineError(code="invalid_type", message=_BODY_TYPE, line=number, param="body")
    if error is not None:
        chunk.errors.append(error)
        return
    chunk.lines.append(
        Line(
            number=number,
            custom_id=request.custom_id,
            offset=offset,
            num_bytes=len(data),
            group_key=group_key(planned),
            num_tokens=estimate_tokens(endpoint, planned),
        )
    )


_BODY_TYPE = "Invalid type for 'body': expected an object."


def _check_envelope(request: _Request, number: int, endpoint: str) -> LineError | None:
    if request.method != "POST":
        message = f"Invalid value: {request.method[:40]!r}. Supported values are: 'POST'."
        return LineError(code="invalid_method", message=message, line=number, param="method")
    if request.url != endpoint:
        message = f"The URL provided for this request does not match the batch endpoint, which is {endpoint}."
        return LineError(code="invalid_url", message=message, line=number, param="url")
    if not 0 < len(request.custom_id) <= MAX_CUSTOM_ID_CHARS or "\0" in request.custom_id:
        message = f"Invalid 'custom_id': expected a string of 1 to {MAX_CUSTOM_ID_CHARS} characters without NUL."
        return LineError(code="invalid_custom_id", message=message, line=number, param="custom_id")
    return None


def _diagnose(data: bytes, number: int) -> LineError:
    """Why a line is not a valid request."""
    unparseable = LineError(code="invalid_json_line", message="This line is not parseable as valid JSON.", line=number)
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return unparseable
    if not isinstance(found, dict):
        return LineError(code="invalid_json_line", message="This line is not a JSON object.", line=number)
    for name in ("custom_id", "method", "url", "body"):
        if name not in found:
            message = f"Missing required parameter: '{name}'."
            return LineError(code="missing_required_parameter", message=message, line=number, param=name)
    for name in ("custom_id", "method", "url"):
        if not isinstance(found[name], str):
            message = f"Invalid type for '{name}': expected a string."
            return LineError(code="invalid_type", message=message, line=number, param=name)
    return unparseable


def _num_prompt_tokens(raw: memoryview) -> int:
    data = bytes(raw)
    if data.startswith(b"[") and data[1:16].lstrip(b" \t[")[:1].isdigit():
        return data.count(b",") + 1
    return len(data) // BYTES_PER_TOKEN
