"""Generates the steps of stored responses with the code that all endpoints use, from where the last runner stopped.

Knows how a stored request becomes a sequence of this gateway again, and which API key its tokens are charged to. Knows no store.
"""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator

import msgspec

from cluster.api.context import ApiContext
from cluster.api.generation.generation import Choice, admit, run
from cluster.api.request_context import RequestContext
from cluster.api.server.errors import ModelNotFoundError, describe
from cluster.api.stored.run import Entered, Run
from cluster.api.stored.steps import to_step
from cluster.keys.accounts import Accounts, RequestUsage
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Group, Ledger, Sums, today
from cluster.responses.items import ResponseError
from cluster.responses.records import Step
from cluster.system.log import trace_ids_var
from cluster.tracing.request import RequestTrace
from workers.errors import OverloadedError, RequestError
from workers.tracing.attributes import Value


class ApiExecutor:
    """An Executor (service.py). keyring, accounts, ledger: the application's; without them nothing is charged."""

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

    async def generate(self, run_: Run, *, entered: Entered | None) -> AsyncGenerator[tuple[Step, str | None], None]:
        with contextlib.ExitStack() as stack:
            if entered is not None:
                stack.push(entered.stack)
            api = self._model_of(run_)
            usage = self._new_usage(run_)
            if usage is not None:
                stack.callback(self._record, usage)
            adapter = run_.stored.request.generate.adapter
            if adapter is not None:
                stack.enter_context(api.adapters.using(adapter))
            choice = _choice(api, run_, RequestContext(usage=usage, trace=self._trace(run_, stack, entered)))
            is_continued = not run_.is_fresh
            if entered is None:
                admission = stack.enter_context(admit(api, [choice], deadline=None))
                if usage is not None and is_continued:
                    usage.num_prompt_tokens = 0  # charged to the first runner's request
            else:
                admission = entered.admission
            arrived = time.monotonic() if entered is None else entered.arrived
            async with contextlib.aclosing(run(api, [choice], admission=admission, arrived=arrived)) as events:
                async for event in events:
                    step = to_step(
                        api,
                        event.step,
                        token_ids=event.token_ids,
                        num_cached_tokens=choice.num_cached_tokens if run_.is_fresh else None,
                        shows_logprobs=run_.stored.request.shows_logprobs,
                    )
                    yield step, choice.trace.numerics or choice.numerics

    def failure(self, error: Exception) -> ResponseError:
        _, body = describe(error)
        if isinstance(error, OverloadedError):
            return ResponseError(code="rate_limit_exceeded", message=body.message)
        code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
        return ResponseError(code=code, message=body.message)  # type: ignore[arg-type]  # one of the two

    def _trace(self, run_: Run, stack: contextlib.ExitStack, entered: Entered | None) -> RequestTrace | None:
        """Part of the trace of the client that waits, or one of its own, which a gateway that takes over makes as well."""
        request, tracing = run_.stored.request, self._api.tracing
        if tracing is None:
            return None
        created_by = request.generate.traceparent
        trace = None
        if entered is not None and created_by is not None:
            trace = tracing.continuing(created_by, endpoint=request.endpoint)
        if trace is None:
            attributes: dict[str, Value] = {
                "gen_ai.response.id": run_.id,
                "tramontane.resumed_tokens": len(run_.output_token_ids),
            }
            trace = tracing.background(
                "stored response", endpoint=request.endpoint, attributes=attributes, created_by=created_by
            )
            stack.callback(trace.end, {})
        trace_ids_var.set(trace.ids)  # in the task of this response
        trace.model = request.asked.model
        return trace

    def _model_of(self, run_: Run) -> ApiContext:
        """Raises ModelNotFoundError if this server has several models and no longer that of the response."""
        request = run_.stored.request
        name = request.generate.adapter or request.asked.model
        api = self._api.serving(name)
        if len(api.models) > 1 and not api.model.knows(name):
            raise ModelNotFoundError(f"The model {name!r} is no longer served.", code="model_not_found")
        return api

    def _new_usage(self, run_: Run) -> RequestUsage | None:
        """Raises NotAllowedError if the key that made the response was revoked."""
        key = self._keyring.owner(run_.record.owner, "response")
        if key is None:
            return None
        usage = self._accounts.usage(key, run_.stored.request.endpoint)
        usage.model = run_.stored.request.asked.model
        return usage

    def _record(self, usage: RequestUsage) -> None:
        """Adds the tokens to those of the request that created the response, which was counted when it came."""
        if self._ledger is not None:
            group = Group(today(), usage.key.id, usage.model, usage.endpoint, usage.key.name)
            self._ledger.add(
                group, Sums(0, usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens, 0)
            )


def _choice(api: ApiContext, run_: Run, context: RequestContext) -> Choice:
    """The sequence, as it was after the tokens that were generated already."""
    request = run_.stored.request
    generate = msgspec.structs.replace(
        request.generate,
        # New each time: a replica may still have the request of another runner.
        request_id=f"{run_.id}-{uuid.uuid4().hex[:8]}",
        output_token_ids=list(run_.output_token_ids),
        traceparent=None,
    )
    output = request.output.open(api.tokenizer)
    if run_.output_token_ids:
        output.replay(run_.output_token_ids)
    return Choice(0, 0, generate, output, context, request.output, run_.record.numerics)
