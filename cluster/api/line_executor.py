"""Executes the lines of batches with the code of the endpoints, without HTTP.

Knows which API key a line is charged to, and which failures mean "try again later" rather than an answer; line_endpoints.py knows the
endpoints. A key's limits per minute do not apply here: lines run after all other requests anyway. Knows no store and no runner.
"""

import asyncio
import logging
import uuid
from typing import Any

import msgspec

from cluster.api.context import ApiContext
from cluster.api.line_endpoints import LINE_ENDPOINTS
from cluster.api.request_context import RequestContext
from cluster.api.server import limits
from cluster.api.server.body import LARGE_BYTES
from cluster.api.server.errors import ErrorEnvelope, describe
from cluster.batch.records import Line, LineResult
from cluster.keys.accounts import Accounts, RequestUsage
from cluster.keys.key import admin_key
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger
from cluster.system.log import request_id_var, trace_ids_var
from cluster.tracing.origin import origin_var
from cluster.tracing.request import RequestTrace
from workers.errors import CrashedError, EngineError, OverloadedError, ReplicaUnavailableError, RequestError
from workers.tracing.attributes import Value, text

log = logging.getLogger(__name__)

# Owns the lines where no key is needed: it may do everything, and nothing is charged.
NO_KEY = admin_key("")


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
        routers = [model.router for model in self._api.models]
        room = max(0, sum(router.batch_balance() for router in routers))
        if len(routers) > 1 and not self._num_running and any(router.is_scaled_to_zero for router in routers):
            room = max(room, 1)  # a file's next line shows which of the models it needs
        return self._num_running + room

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        context = RequestContext(usage=self._new_usage(endpoint, owner), is_batch_line=True)
        model: str = self._read(endpoint, body, context).model
        return model

    async def execute(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        request_id = f"req-{uuid.uuid4().hex}"
        trace = self._trace(line, endpoint)
        token, ids_token = request_id_var.set(request_id), trace_ids_var.set(None if trace is None else trace.ids)
        self._num_running += 1
        try:
            result = await self._answer(line, endpoint=endpoint, body=body, seed=seed, owner=owner, trace=trace)
            if trace is not None and result.status_code is not None:
                trace.end({"http.response.status_code": result.status_code})
        finally:
            self._num_running -= 1
            request_id_var.reset(token)
            trace_ids_var.reset(ids_token)
            if trace is not None:
                trace.end({}, error="not_answered")
        return msgspec.structs.replace(result, request_id=request_id)

    def _trace(self, line: Line, endpoint: str) -> RequestTrace | None:
        """Of its own: a batch may take hours."""
        tracing, origin = self._api.tracing, origin_var.get()
        if tracing is None:
            return None
        attributes: dict[str, Value] = {
            "tramontane.batch.line": line.number,
            "tramontane.batch.custom_id": text(line.custom_id),
        }
        if origin is not None:
            attributes["tramontane.batch.id"] = origin.batch_id
        created_by = None if origin is None else origin.created_by
        return tracing.background("batch line", endpoint=endpoint, attributes=attributes, created_by=created_by)

    async def _answer(
        self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str, trace: RequestTrace | None
    ) -> LineResult:
        try:
            usage = self._new_usage(endpoint, owner)
        except RequestError as e:
            self._api.metrics.line_answered(completed=False)
            return _failed(line, e)
        # One crash is reported at once: the batch's runner finds out which line caused it.
        context = RequestContext(usage=usage, seed=seed, is_batch_line=True, max_crashes=1, trace=trace)
        try:
            request = (
                self._read(endpoint, body, context)
                if len(body) <= LARGE_BYTES
                else await asyncio.to_thread(self._read, endpoint, body, context)
            )
            if context.ignored:
                log.info("Ignored fields of a batch line: %s.", context.ignored_text)
            with context.at_end:
                response = await LINE_ENDPOINTS[endpoint].answer(self._api.serving(request.model), request, context)
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
        self._api.serving(usage.model or None).metrics.line_answered(completed=result.is_completed)
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
        return LINE_ENDPOINTS[endpoint].read(self._api, data, context)

    def _new_usage(self, endpoint: str, owner: str) -> RequestUsage:
        """Raises NotAllowedError if the key that made the batch was revoked."""
        return self._accounts.unlimited_usage(self._keyring.owner(owner, "batch") or NO_KEY, f"{endpoint} (batch)")


def _failed(line: Line, error: Exception, usage: RequestUsage | None = None) -> LineResult:
    """The response that HTTP would give."""
    if usage is not None:
        usage.failed = True
    status, body = describe(error)
    return LineResult(number=line.number, status_code=status, body=msgspec.json.encode(ErrorEnvelope(error=body)))
