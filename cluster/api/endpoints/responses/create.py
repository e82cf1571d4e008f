"""POST /v1/responses and /v1/responses/input_tokens: a response to a conversation, stored unless the client says otherwise.

A stored response runs on its own (cluster/api/stored); this handler only reads along, as everybody else may. One that is not stored
lives and dies with its request, as in chat. Knows the order of the steps; the prompt and the tokens come from the code of chat.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace

from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints import chat
from cluster.api.endpoints.batches.access import owner_of
from cluster.api.endpoints.responses.access import find_chain, service_of
from cluster.api.endpoints.responses.conversation import (
    CHAT_NAMES,
    items_before,
    items_of,
    shorter,
    shown_items,
    to_messages,
)
from cluster.api.endpoints.responses.formatter import ResponseFormatter
from cluster.api.endpoints.responses.stream import stream_stored
from cluster.api.endpoints.responses.to_chat import (
    asked,
    chat_request,
    note_ignored,
    note_ignored_input,
    prompt_fields,
    shows_logprobs,
)
from cluster.api.generation.answering import Prepared, answer, json_response
from cluster.api.generation.conversation import encode_conversation
from cluster.api.generation.field_names import renamed
from cluster.api.generation.generation import admit
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.schemas.responses.request import InputItem, InputTokens, ResponseInput, ResponseRequest, name_items
from cluster.api.server import request_options, sse
from cluster.api.server.body import read_body
from cluster.api.stored.run import Entered
from cluster.api.stored.service import ResponseService
from cluster.responses.records import LIFETIME_S, ResponseRecord, Stored, StoredRequest, new_response_id, show
from cluster.system.log import log_prompt
from workers.errors import EngineError, ReplicaUnavailableError, RequestError


async def handle(request: web.Request) -> web.StreamResponse:
    """One response, or a stream of events."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, ResponseRequest, adapt=name_items)
    stores = _stores(request, body)
    before = [] if body.previous_response_id is None else items_before(await find_chain(request, body))
    items = items_of(body.input)
    with renamed(CHAT_NAMES):
        chat_body = chat_request(body, to_messages([*before, *items], instructions=body.instructions))
        chat.check(api, chat_body, context)
        note_ignored(api, body, context)
        log_prompt(chat_body.messages)
        prepared = await _prepare(api, body, [*before, *items], context)
    choice = prepared.choices[0]
    now = int(time.time())
    record = ResponseRecord(
        id=new_response_id(),
        owner=owner_of(request),
        status="queued" if body.background else "in_progress",
        created_at=now,
        expires_at=now + LIFETIME_S,
        previous_response_id=body.previous_response_id,
    )
    told = asked(body, choice.request.sampling, store=stores)
    if not stores:
        formatter = ResponseFormatter(api, record, told, choice, shows_logprobs=shows_logprobs(body))
        wire = sse.Wire(encode=sse.encode_named, error=formatter.error, end=b"")
        unstored = replace(prepared, formatter=formatter, wire=wire)
        return await answer(request, api, unstored, deadline=deadline, arrived=arrived)
    stored = Stored(
        record=record,
        request=StoredRequest(
            asked=told,
            items=shown_items(items, record.id),
            generate=choice.request,
            output=choice.options,
            shows_logprobs=shows_logprobs(body),
        ),
    )
    service = service_of(request)
    await service.add(stored, entered=await _enter(api, prepared, deadline=deadline, arrived=arrived, body=body))
    if body.stream:
        return await stream_stored(request, stored, starting_after=-1)
    if body.background:
        return json_response(show(record, told))
    ended = await _whole(service, stored)
    return json_response(show(ended, told), headers=request_options.moved_headers(ended.num_numerics_changes))


async def count_tokens(request: web.Request) -> web.Response:
    """How many tokens the prompt has."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    body = await read_body(request, ResponseInput, adapt=name_items)
    api.check_model(body.model, context)
    before = [] if body.previous_response_id is None else items_before(await find_chain(request, body))
    messages = to_messages([*before, *items_of(body.input)], instructions=body.instructions)
    note_ignored_input(api, body, context)
    tools = prompt_fields(body)["tools"] or []
    with renamed(CHAT_NAMES):
        prompt = await encode_conversation(api, messages, tools=[] if body.tool_choice == "none" else tools)
    return json_response(InputTokens(input_tokens=len(prompt.token_ids)))


def _stores(request: web.Request, body: ResponseRequest) -> bool:
    """Whether the response is stored. Raises RequestError if it must be and cannot."""
    api = request.app[CONTEXT]
    can_store = api.batches is not None and api.batches.responses is not None
    if body.background and body.store is False:
        raise RequestError(
            "'background' needs 'store'.", remedy="Remove 'store', or set it to true.", param="background"
        )
    if (body.store or body.background) and not can_store:
        service_of(request)  # says why
    if body.background and api.router.closing is not None:
        raise ReplicaUnavailableError(api.router.closing, remedy="Try again in a moment.")
    return can_store and body.store is not False


async def _prepare(
    api: ApiContext, body: ResponseRequest, items: Sequence[InputItem], context: RequestContext
) -> Prepared:
    """With "truncation": "auto", the longest end of the conversation that fits."""

    async def attempt(some: Sequence[InputItem]) -> Prepared | RequestError:
        messages = to_messages(some, instructions=body.instructions)
        try:
            return await chat.prepare(api, chat_request(body, messages), context, reads_thoughts=False)
        except RequestError as e:
            if e.code != "context_length_exceeded":
                raise
            return e

    found = await attempt(items)
    if isinstance(found, RequestError) and body.truncation == "auto":
        options = shorter(items)
        low, high = 0, len(options)  # the first that fits is in options[low:high + 1]
        while low < high:
            middle = (low + high) // 2
            tried = await attempt(options[middle])
            if isinstance(tried, RequestError):
                low, found = middle + 1, tried if isinstance(found, RequestError) else found
            else:
                high, found = middle, tried
    if isinstance(found, RequestError):
        raise found
    return found


async def _enter(
    api: ApiContext, prepared: Prepared, *, deadline: float | None, arrived: float, body: ResponseRequest
) -> Entered | None:
    """Room for a response whose client waits. One in the background waits for room by itself. Raises what `admit` raises."""
    if body.background:
        return None
    with ExitStack() as stack:
        admission = stack.enter_context(admit(api, prepared.choices, deadline=deadline))
        return Entered(stack.pop_all(), admission, arrived)
    raise AssertionError("an ExitStack suppresses nothing")


async def _whole(service: ResponseService, stored: Stored) -> ResponseRecord:
    """The record at the end. Raises the error of a response that failed."""
    async with aclosing(service.follow(stored.record.id, is_live=False)) as following:
        async for progress in following:
            record = progress.record
            if record is not None and record.error is not None:
                raise progress.error or EngineError(record.error.message)
            if record is not None:
                return record
    raise AssertionError("the last progress has the record")
