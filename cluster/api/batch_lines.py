"""Answers the lines of batches with the very code of the endpoints, without HTTP.

Knows which endpoint reads and answers which body, whose usage a line is, and which failures mean "later" instead of an answer. The
limits of a key per minute do not hold here: lines wait for whatever is no line anyway. Knows no store and no runner.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.api.context import Gateway
from cluster.api.endpoints import chat, completions, embeddings
from cluster.api.generation import answering
from cluster.api.generation.origin import Origin
from cluster.api.schemas.chat import ChatRequest
from cluster.api.schemas.completions import CompletionRequest
from cluster.api.schemas.other import EmbeddingRequest
from cluster.api.schemas.parse import parse
from cluster.api.server import limits
from cluster.api.server.body import LARGE_BYTES
from cluster.api.server.errors import ErrorEnvelope, describe
from cluster.batch.records import Line, LineResult
from cluster.keys.accounts import Accounts, Use
from cluster.keys.key import ApiKey, NotAllowedError, admin_key
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger
from cluster.system.log import request_id_var
from workers.errors import CrashedError, EngineError, OverloadedError, ReplicaUnavailableError, RequestError

NOBODY = admin_key("")  # whose lines are where nobody needs a key: it may do everything and nobody is charged


@dataclass(frozen=True, kw_only=True)
class _Endpoint:
    """`body`: its struct. `check`: what can be said of one without a replica. `answer`: from a checked body to the answer."""

    body: type[msgspec.Struct]
    check: Callable[[Gateway, Any], None]
    answer: Callable[[Gateway, Any, Origin], Awaitable[msgspec.Struct]]


async def _complete(gateway: Gateway, body: Any, origin: Origin) -> msgspec.Struct:
    prepared = await completions.prepare(gateway, body, origin)
    return await answering.complete(gateway, prepared, arrived=time.monotonic())


async def _chat(gateway: Gateway, body: Any, origin: Origin) -> msgspec.Struct:
    prepared = await chat.prepare(gateway, body, origin)
    return await answering.complete(gateway, prepared, arrived=time.monotonic())


async def _embed(gateway: Gateway, body: Any, origin: Origin) -> msgspec.Struct:
    return await embeddings.complete(gateway, body, origin, arrived=time.monotonic())


_ENDPOINTS = {
    "/v1/completions": _Endpoint(body=CompletionRequest, check=completions.check, answer=_complete),
    "/v1/chat/completions": _Endpoint(body=ChatRequest, check=chat.check, answer=_chat),
    "/v1/embeddings": _Endpoint(body=EmbeddingRequest, check=embeddings.check, answer=_embed),
}


class ApiLineExecutor:
    """A LineExecutor (cluster/batch/run/executor.py). keyring, accounts, ledger: the application's own; without them nobody is charged."""

    def __init__(
        self,
        gateway: Gateway,
        *,
        keyring: Keyring | None = None,
        accounts: Accounts | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._gateway = gateway
        self._keyring = keyring or Keyring()
        self._accounts = accounts or Accounts()
        self._ledger = ledger
        self._num_running = 0

    @property
    def capacity(self) -> int:
        return self._num_running + self._gateway.router.batch_room()

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        with limits.using(self._use(endpoint, owner)):
            model: str = self._read(endpoint, body).model
            return model

    async def execute(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        request_id = f"req-{uuid.uuid4().hex}"
        token = request_id_var.set(request_id)
        self._num_running += 1
        try:
            result = await self._answer(line, endpoint=endpoint, body=body, seed=seed, owner=owner)
        finally:
            self._num_running -= 1
            request_id_var.reset(token)
        self._gateway.metrics.line_answered(completed=result.is_completed)
        return msgspec.structs.replace(result, request_id=request_id)

    async def _answer(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        try:
            use = self._use(endpoint, owner)
        except RequestError as e:
            return _failed(line, e)
        # A crash is told at once: whoever runs the batch finds out which line was the reason.
        origin = Origin(seed=seed, is_line=True, max_crashes=1)
        with limits.using(use):
            try:
                request = (
                    self._read(endpoint, body)
                    if len(body) <= LARGE_BYTES
                    else await asyncio.to_thread(self._read, endpoint, body)
                )
                answer = await _ENDPOINTS[endpoint].answer(self._gateway, request, origin)
            except CrashedError as e:
                raise ReplicaUnavailableError(str(e), crashed=True, alone=e.alone) from e
            except (ReplicaUnavailableError, OverloadedError):
                raise
            except EngineError as e:
                if isinstance(
                    e.__cause__, ReplicaUnavailableError
                ):  # bad luck many times in a row, which ends some time
                    raise ReplicaUnavailableError(str(e)) from e
                result = _failed(line, e, use)
            except Exception as e:
                result = _failed(line, e, use)
            else:
                result = LineResult(number=line.number, status_code=200, body=msgspec.json.encode(answer))
        if self._ledger is not None and use.key is not NOBODY:
            limits.write(self._ledger, use)
        return msgspec.structs.replace(
            result,
            num_prompt_tokens=use.num_prompt_tokens,
            num_cached_tokens=use.num_cached_tokens,
            num_output_tokens=use.num_completion_tokens,
        )

    def _read(self, endpoint: str, data: bytes) -> Any:
        """Raises RequestError."""
        body: Any = parse(data, _ENDPOINTS[endpoint].body)
        _ENDPOINTS[endpoint].check(self._gateway, body)
        if getattr(body, "stream", None):
            raise RequestError("A line of a batch cannot be streamed; leave 'stream' out.", param="stream")
        if body.priority is not None and body.priority < 0:
            raise RequestError(
                "The 'priority' of a batch's line counts among lines only, and must be 0 or more.", param="priority"
            )
        return body

    def _use(self, endpoint: str, owner: str) -> Use:
        """Raises NotAllowedError for a key that is no more."""
        key: ApiKey | None = NOBODY
        if owner and self._keyring.guards:
            key = self._keyring.get(owner)
            if key is None:
                raise NotAllowedError("The API key that made this batch is no longer valid.", code="api_key_revoked")
        return self._accounts.unlimited_use(key or NOBODY, f"{endpoint} (batch)")


def _failed(line: Line, error: Exception, use: Use | None = None) -> LineResult:
    """The answer that HTTP would give."""
    if use is not None:
        use.failed = True
    status, body = describe(error)
    return LineResult(number=line.number, status_code=status, body=msgspec.json.encode(ErrorEnvelope(error=body)))
