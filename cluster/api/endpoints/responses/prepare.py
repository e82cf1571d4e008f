"""From the body of a response to sequences that are ready to run: checked, encoded, and shortened if the client allows it.

Knows the body, the items before it and the code of chat. Knows no store: access.py finds the conversation before.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from cluster.api.context import ApiContext
from cluster.api.endpoints import chat
from cluster.api.endpoints.responses.conversation import in_own_names, items_of, shorter, to_messages
from cluster.api.endpoints.responses.formatter import ResponseFormatter
from cluster.api.endpoints.responses.to_chat import chat_request, note_ignored, shows_logprobs
from cluster.api.generation.answering import Prepared
from cluster.api.request_context import RequestContext
from cluster.api.schemas.chat import ChatRequest
from cluster.api.schemas.responses.request import InputItem, ResponseRequest
from cluster.api.server import sse
from cluster.responses.items import Asked
from cluster.responses.records import LIFETIME_S, ResponseRecord, new_response_id
from workers.errors import RequestError


def check(
    api: ApiContext, body: ResponseRequest, context: RequestContext, *, before: Sequence[InputItem] = ()
) -> ChatRequest:
    """The request that chat would get, after all checks that need no replica. before: what was said earlier. Raises RequestError."""
    with in_own_names():
        messages = to_messages([*before, *items_of(body.input)], instructions=body.instructions)
        chat_body = chat_request(body, messages)
        chat.check(api, chat_body, context)
        note_ignored(api, body, context)
    return chat_body


async def prepare(
    api: ApiContext, body: ResponseRequest, items: Sequence[InputItem], context: RequestContext
) -> Prepared:
    """items: the whole conversation; with "truncation": "auto", its longest end that fits. Raises what chat.prepare raises."""

    async def attempt(some: Sequence[InputItem]) -> Prepared | RequestError:
        messages = to_messages(some, instructions=body.instructions)
        try:
            return await chat.prepare(api, chat_request(body, messages), context, reads_thoughts=False)
        except RequestError as e:
            if e.code != "context_length_exceeded":
                raise
            return e

    with in_own_names():
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


def new_record(body: ResponseRequest, *, owner: str) -> ResponseRecord:
    """Of a response that begins now."""
    now = int(time.time())
    return ResponseRecord(
        id=new_response_id(),
        owner=owner,
        status="queued" if body.background else "in_progress",
        created_at=now,
        expires_at=now + LIFETIME_S,
        previous_response_id=body.previous_response_id,
    )


def in_one_go(
    api: ApiContext, body: ResponseRequest, prepared: Prepared, record: ResponseRecord, told: Asked
) -> Prepared:
    """The same, formatted as a response that is not stored: it lives and dies with its request."""
    prepared.choices[0].rename(record.id)
    formatter = ResponseFormatter(api, record, told, prepared.choices[0], shows_logprobs=shows_logprobs(body))
    wire = sse.Wire(encode=sse.encode_named, error=formatter.error, end=b"")
    return replace(prepared, formatter=formatter, wire=wire)
