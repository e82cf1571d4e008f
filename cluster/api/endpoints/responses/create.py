"""POST /v1/responses and /v1/responses/input_tokens: a response to a conversation, stored unless the client says otherwise.

A stored response runs on its own (cluster/api/stored); this handler only reads along, as everybody else may. One that is not stored
lives and dies with its request, as in chat. Knows the order of the steps; the prompt and the tokens come from the code of chat.
"""

import time
from contextlib import ExitStack, aclosing

import msgspec
from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints.batches.access import owner_of, view_of
from cluster.api.endpoints.responses.access import find_chain, responses_of, service_of
from cluster.api.endpoints.responses.conversation import in_own_names, items_before, items_of, shown_items, to_messages
from cluster.api.endpoints.responses.prepare import check, in_one_go, new_record, prepare
from cluster.api.endpoints.responses.stream import stream_stored
from cluster.api.endpoints.responses.to_chat import asked, note_ignored_input, prompt_fields, shows_logprobs
from cluster.api.generation.answering import Prepared, answer, json_response
from cluster.api.generation.conversation import encode_conversation
from cluster.api.generation.generation import admit
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.schemas.responses.request import InputItem, InputTokens, ResponseInput, ResponseRequest, name_items
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.api.stored.run import Entered
from cluster.api.stored.service import ResponseService
from cluster.responses.records import ResponseRecord, Stored, StoredRequest, show
from cluster.system.log import log_prompt
from workers.errors import EngineError, ReplicaUnavailableError, RequestError


async def handle(request: web.Request) -> web.StreamResponse:
    """One response, or a stream of events."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, ResponseRequest, adapt=name_items)
    api = api.serving(body.model)
    stores = _stores(api, body)
    before = await _before(request, body)
    items = items_of(body.input)
    chat_body = check(api, body, context, before=before)
    log_prompt(chat_body.messages)
    prepared = await prepare(api, body, [*before, *items], context)
    choice = prepared.choices[0]
    record = new_record(body, owner=owner_of(request))
    told = asked(body, choice.request.sampling, store=stores)
    if not stores:
        prepared = in_one_go(api, body, prepared, record, told)
        return await answer(request, api, prepared, deadline=deadline, arrived=arrived)
    stored = Stored(
        record=record,
        request=StoredRequest(
            asked=told,
            items=shown_items(items, record.id),
            generate=msgspec.structs.replace(choice.request, traceparent=context.traceparent),
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
    api = api.serving(body.model)
    api.check_model(body.model, context)
    before = await _before(request, body)
    messages = to_messages([*before, *items_of(body.input)], instructions=body.instructions)
    note_ignored_input(api, body, context)
    tools = prompt_fields(body)["tools"] or []
    with in_own_names():
        prompt = await encode_conversation(api, messages, tools=[] if body.tool_choice == "none" else tools)
    return json_response(InputTokens(input_tokens=len(prompt.token_ids)))


def _stores(api: ApiContext, body: ResponseRequest) -> bool:
    """Whether the response is stored. Raises RequestError if it must be and cannot."""
    can_store = api.batches is not None and api.batches.responses is not None
    if body.background and body.store is False:
        raise RequestError(
            "'background' needs 'store'.", remedy="Remove 'store', or set it to true.", param="background"
        )
    if (body.store or body.background) and not can_store:
        responses_of(api)  # says why
    if body.background and api.router.closing is not None:
        raise ReplicaUnavailableError(api.router.closing, remedy="Try again in a moment.")
    return can_store and body.store is not False


async def _before(request: web.Request, body: ResponseInput) -> list[InputItem]:
    """What was said in the conversation so far. Raises RequestError."""
    if body.previous_response_id is None:
        return []
    return items_before(await find_chain(request.app[CONTEXT], body, view=view_of(request)))


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
