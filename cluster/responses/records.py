"""What is stored of a response: its record, its request, and the steps in which its output was generated. Frozen; knows no database.

Everything that decides the output is in the request, from the moment it is created: the prompt's token ids, the sampling parameters with
their seed, the adapter's revision. So any gateway can go on after the last stored step and gets the tokens that the first one would have
got. Times are Unix seconds. `owner` is the id of the API key that created the response, "" without keys.
"""

import uuid
from typing import Any

import msgspec

from cluster.responses.items import (
    Asked,
    IncompleteDetails,
    OutputItem,
    Response,
    ResponseError,
    ResponseInputDetails,
    ResponseUsage,
    Status,
    TextLogprob,
)
from cluster.text.output.options import OutputOptions
from workers.protocol import GenerateRequest

RUNNING: tuple[Status, ...] = ("queued", "in_progress")
LIFETIME_S = 30 * 86_400  # as long as OpenAI keeps a response


class CallPiece(msgspec.Struct, frozen=True, array_like=True):
    """A piece of the call number `index`: the first has the id and the name, the others the next part of the arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What one step of the engine added: its tokens, and what the client sees of them.

    `finish_reason`: "stop" or "length" in the last step. `num_cached_tokens`: of the prompt, in the first step.
    `logprobs`: of the tokens whose text is complete now, if the request asked for them.
    """

    token_ids: list[int]
    text: str = ""
    finish_reason: str | None = None
    calls: list[CallPiece] = []
    num_cached_tokens: int | None = None
    logprobs: list[TextLogprob] = []


class StoredRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`items`: the input, each with an id, without what came before in the conversation. `generate`: for the replica.

    `output`: how its tokens become text. `shows_logprobs`: whether the response has log-probabilities.
    """

    asked: Asked
    items: list[dict[str, Any]]
    generate: GenerateRequest
    output: OutputOptions
    shows_logprobs: bool = False
    endpoint: str = "/v1/responses"


class ResponseRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a response. `output` and `usage` are set when it has ended.

    `numerics`: of the replica that generated the newest token. `num_numerics_changes`: how often it went on with others.
    """

    id: str
    owner: str
    status: Status
    created_at: int
    expires_at: int
    previous_response_id: str | None = None
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None
    numerics: str | None = None
    num_numerics_changes: int = 0

    @property
    def has_ended(self) -> bool:
        return self.status not in RUNNING


class ResponseLease(msgspec.Struct, frozen=True, kw_only=True):
    """The right to run a response. `fence` grows by one with every runner, so that an older one can no longer store anything; the first
    one has 1.
    """

    response_id: str
    owner: str
    fence: int


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A response as the store has it."""

    record: ResponseRecord
    request: StoredRequest


class Append(msgspec.Struct, frozen=True, kw_only=True):
    """Steps to store under a lease: `data` from `encode_steps`, `number` the first one's. `record`: replaces the stored one."""

    lease: ResponseLease
    number: int
    data: bytes
    record: ResponseRecord | None = None


def new_response_id() -> str:
    return f"resp_{uuid.uuid4().hex}"


def item_id(response_id: str, kind: str, index: int) -> str:
    """The same each time it is computed. kind: "msg", "fc", and "in" for an item of the input."""
    return f"{kind}_{response_id.removeprefix('resp_')}{index:04x}"


def show(record: ResponseRecord, asked: Asked) -> Response:
    """The response as the API shows it."""
    return Response(
        **msgspec.structs.asdict(asked),
        id=record.id,
        created_at=record.created_at,
        status=record.status,
        output=record.output,
        completed_at=record.completed_at,
        error=record.error,
        incomplete_details=record.incomplete_details,
        usage=record.usage,
    )


def usage_of(num_prompt_tokens: int, steps: list[Step]) -> ResponseUsage:
    """What the steps used."""
    num_output_tokens = sum(len(step.token_ids) for step in steps)
    cached = next((step.num_cached_tokens for step in steps if step.num_cached_tokens is not None), 0)
    return ResponseUsage(
        input_tokens=num_prompt_tokens,
        input_tokens_details=ResponseInputDetails(cached_tokens=cached),
        output_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
    )


_step_encoder = msgspec.msgpack.Encoder()
_step_decoder = msgspec.msgpack.Decoder(list[Step])


def encode_steps(steps: list[Step]) -> bytes:
    """For the store: ten bytes for a token, and its text."""
    return _step_encoder.encode(steps)


def decode_steps(data: bytes) -> list[Step]:
    return _step_decoder.decode(data)
