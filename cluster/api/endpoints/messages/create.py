"""POST /v1/messages and /v1/messages/count_tokens: answer a conversation, or count its tokens, as Anthropic's clients speak it.

Knows the order of the steps; the prompt and the tokens come from the code of chat.
"""

import time
import uuid
from dataclasses import replace

import msgspec
from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints import chat
from cluster.api.endpoints.messages.formatter import MessageFormatter
from cluster.api.endpoints.messages.to_chat import chat_request, in_own_names, note_ignored, prompt_fields, to_messages
from cluster.api.generation.answering import Prepared, answer, json_response
from cluster.api.generation.conversation import encode_conversation
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.schemas.chat import ChatRequest
from cluster.api.schemas.messages.request import MessagePrompt, MessageRequest
from cluster.api.schemas.messages.response import TokenCount
from cluster.api.server import request_options, sse
from cluster.api.server.body import read_body
from cluster.api.server.errors import encode_message_error
from cluster.system.log import log_prompt
from workers.errors import RequestError

_WIRE = sse.Wire(
    encode=sse.encode_named, error=lambda e: b"event: error\ndata: " + encode_message_error(e) + b"\n\n", end=b""
)


async def handle(request: web.Request) -> web.StreamResponse:
    """One message, or a stream of events."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, MessageRequest)
    api = api.serving(body.model)
    chat_body = check(api, body, context)
    log_prompt(chat_body.messages)
    prepared = await prepare(api, body, context)
    return await answer(request, api, prepared, deadline=deadline, arrived=arrived)


def check(api: ApiContext, body: MessageRequest, context: RequestContext) -> ChatRequest:
    """The request that chat would get, after all checks that need no replica. Raises RequestError."""
    with in_own_names():
        chat_body = chat_request(body)
        chat.check(api, chat_body, context)
        note_ignored(api, body, context)
    return chat_body


async def prepare(api: ApiContext, body: MessageRequest, context: RequestContext) -> Prepared:
    """Raises what chat.prepare raises."""
    fills_context = False
    with in_own_names():
        chat_body = chat_request(body)
        try:
            prepared = await chat.prepare(api, chat_body, context, reads_thoughts=False)
        except RequestError as e:
            if (e.code, e.param) != ("context_length_exceeded", "max_tokens"):
                raise
            # Clients must send a limit, and many send one above the model's context.
            fills_context, chat_body = True, msgspec.structs.replace(chat_body, max_tokens=None)
            prepared = await chat.prepare(api, chat_body, context, reads_thoughts=False)
    message_id = f"msg_{uuid.uuid4().hex}"
    prepared.choices[0].rename(message_id)
    formatter = MessageFormatter(
        prepared.choices[0],
        message_id=message_id,
        model=body.model,
        at_limit="model_context_window_exceeded" if fills_context else "max_tokens",
    )
    return replace(prepared, formatter=formatter, wire=_WIRE)


async def count_tokens(request: web.Request) -> web.Response:
    """How many tokens the prompt has."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    body = await read_body(request, MessagePrompt)
    api = api.serving(body.model)
    api.check_model(body.model, context)
    note_ignored(api, body, context)
    with in_own_names():
        fields = prompt_fields(body)
        offered = [] if fields["tool_choice"] == "none" else fields["tools"] or []
        prompt = await encode_conversation(api, to_messages(body), tools=offered)
    return json_response(TokenCount(input_tokens=len(prompt.token_ids)))
