"""Executes the lines of batches with the code of the endpoints, without HTTP.

Knows which endpoint reads and answers which body, which API key a line is charged to, and which failures mean "try again later" rather
than an answer. A key's limits per minute do not apply here: lines run after all other requests anyway. Knows no store and no runner.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.api.context import ApiContext
from cluster.api.endpoints import chat, completions, embeddings
from cluster.api.generation import answering
from cluster.api.request_context import RequestContext
from cluster.api.schemas.chat import ChatRequest
from cluster.api.schemas.completions import CompletionRequest
from cluster.api.schemas.embeddings import EmbeddingRequest
from cluster.api.schemas.parse import parse
from cluster.api.server import limits
from cluster.api.server.body import LARGE_BYTES
from cluster.api.server.errors import ErrorEnvelope, describe
from cluster.batch.records import Line, LineResult
from cluster.keys.accounts import Accounts, RequestUsage
from cluster.keys.key import ApiKey, NotAllowedError, admin_key
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger
from cluster.system.log import request_id_var
from workers.errors import CrashedError, EngineError, OverloadedError, ReplicaUnavailableError, RequestError

log = logging.getLogger(__name__)

# Owns the lines where no key is needed: it may do everything, and nothing is charged.
NO_KEY = admin_key("")


@dataclass(frozen=True, kw_only=True)
class _LineEndpoint:
    """`body`: its struct. `check`: all that can be checked without a replica. `answer`: from a checked body to the response."""

    body: type[msgspec.Struct]
    check: Callable[[ApiContext, Any, RequestContext], None]
    answer: Callable[[ApiContext, Any, RequestContext], Awaitable[msgspec.Struct]]


async def _complete(api: ApiContext, body: Any, context: RequestContext) -> msgspec.Struct:
    prepared = await completions.prepare(api, body, context)
    return await answering.complete(api, prepared, arrived=time.monotonic())


async def _chat(api: ApiContext, body: Any, context: RequestContext) -> msgspec.Struct:
    prepared = await chat.prepare(api, body, context)
    return await answering.complete(api, prepared, arrived=time.monotonic())


async def _embed(api: ApiContext, body: Any, context: RequestContext) -> msgspec.Struct:
    return await embeddings.complete(api, body, context, arrived=time.monotonic())


_ENDPOINTS = {
    "/v1/completions": _LineEndpoint(body=CompletionRequest, check=completions.check, answer=_complete),
    "/v1/chat/completions": _LineEndpoint(body=ChatRequest, check=chat.check, answer=_chat),
    "/v1/embeddings": _LineEndpoint(body=EmbeddingRequest, check=embeddings.check, answer=_embed),
}


class ApiLineExecutor:
    """A LineExecutor (cluster/batch/run/executor.py). keyring, accounts, ledger: the application's; without them nothing is charged."""

    def __init__(
        self,
        api: ApiContext,
        *,
        keyring: Keyring | None = None,
        accounts: Accounts | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._api = api
        self._keyring = keyring or Keyring()
        self._accounts = accounts or Accounts()
        self._ledger = ledger
        self._num_running = 0

    @property
    def capacity(self) -> int:
        return self._num_running + self._api.router.batch_room()

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        context = RequestContext(usage=self._new_usage(endpoint, owner), is_batch_line=True)
        model: str = self._read(endpoint, body, context).model
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
        self._api.metrics.line_answered(completed=result.is_completed)
        return msgspec.structs.replace(result, request_id=request_id)

    async def _answer(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        try:
            usage = self._new_usage(endpoint, owner)
        except RequestError as e:
            return _failed(line, e)
        # One crash is reported at once: the batch's runner finds out which line caused it.
        context = RequestContext(usage=usage, seed=seed, is_batch_line=True, max_crashes=1)
        try:
            request = (
                self._read(endpoint, body, context)
                if len(body) <= LARGE_BYTES
                else await asyncio.to_thread(self._read, endpoint, body, context)
            )
            if context.ignored:
                log.info("Ignored fields of a batch line: %s.", context.ignored_text)
            with context.at_end:
                response = await _ENDPOINTS[endpoint].answer(self._api, request, context)
        except CrashedError as e:
            raise ReplicaUnavailableError(str(e), crashed=True, alone=e.alone) from e
        except (ReplicaUnavailableError, OverloadedError):
            raise
        except EngineError as e:
            # Replicas were lost many times in a row, which ends sooner or later.
            if isinstance(e.__cause__, ReplicaUnavailableError):
                raise ReplicaUnavailableError(str(e)) from e
            result = _failed(line, e, usage)
        except Exception as e:
            result = _failed(line, e, usage)
        else:
            result = LineResult(number=line.number, status_code=200, body=msgspec.json.encode(response))
        if usage.key is not NO_KEY:
            self._api.metrics.used_by_key(
                usage.key.name,
                num_prompt_tokens=usage.num_prompt_tokens,
                num_output_tokens=usage.num_output_tokens,
            )
        if self._ledger is not None and usage.key is not NO_KEY:
            limits.record(self._ledger, usage)
        return msgspec.structs.replace(
            result,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_output_tokens=usage.num_output_tokens,
        )

    def _read(self, endpoint: str, data: bytes, context: RequestContext) -> Any:
        """The checked body. Raises RequestError."""
        body: Any
        body, ignored = parse(data, _ENDPOINTS[endpoint].body, strict=self._api.strict)
        context.ignored.extend(ignored)
        _ENDPOINTS[endpoint].check(self._api, body, context)
        if getattr(body, "stream", None):
            raise RequestError(
                "A line of a batch cannot be streamed.", remedy="Remove 'stream' from the line's body.", param="stream"
            )
        if body.priority is not None and body.priority < 0:
            raise RequestError(
                f"'priority' is {body.priority}; in a batch it orders the batch's lines only and cannot be negative.",
                remedy="Send 0 or more.",
                param="priority",
            )
        return body

    def _new_usage(self, endpoint: str, owner: str) -> RequestUsage:
        """Raises NotAllowedError if the key that made the batch was revoked."""
        key: ApiKey | None = NO_KEY
        if owner and self._keyring.guards:
            key = self._keyring.get(owner)
            if key is None:
                raise NotAllowedError("The API key that made this batch is no longer valid.", code="api_key_revoked")
        return self._accounts.unlimited_usage(key or NO_KEY, f"{endpoint} (batch)")


def _failed(line: Line, error: Exception, usage: RequestUsage | None = None) -> LineResult:
    """The response that HTTP would give."""
    if usage is not None:
        usage.failed = True
    status, body = describe(error)
    return LineResult(number=line.number, status_code=status, body=msgspec.json.encode(ErrorEnvelope(error=body)))
