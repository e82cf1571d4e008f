"""What the handlers of stored responses share: the service, and who may see a response. A key sees what it created."""

import re

from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints.batches.access import view_of
from cluster.api.schemas.responses.request import ResponseInput
from cluster.api.server.errors import NotFoundError
from cluster.api.stored.service import ResponseService
from cluster.responses.records import Stored
from workers.errors import RequestError

MAX_CHAIN = 1000
_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


def service_of(request: web.Request) -> ResponseService:
    """Raises RequestError if this server stores no responses."""
    return responses_of(request.app[CONTEXT])


def responses_of(api: ApiContext) -> ResponseService:
    """Raises RequestError if this server stores no responses."""
    batches = api.batches
    if batches is None or batches.responses is None:
        raise RequestError(
            "This server stores no responses: it has no store for batches.",
            remedy="Send 'store': false, and the whole conversation as 'input'.",
            code="store_disabled",
        )
    return batches.responses


async def find_response(request: web.Request) -> Stored:
    """The response in the path. Raises NotFoundError."""
    response_id = request.match_info["response_id"]
    stored = await service_of(request).store.get(response_id) if _ID.fullmatch(response_id) else None
    if stored is None or view_of(request) not in (None, stored.record.owner):
        raise not_found(response_id)
    return stored


async def find_chain(api: ApiContext, body: ResponseInput, *, view: str | None) -> list[Stored]:
    """The conversation before this response, oldest first. view: the key whose responses may be seen, None: all. Raises RequestError."""
    previous = body.previous_response_id or ""
    chain = await responses_of(api).store.chain(previous, most=MAX_CHAIN)
    last = chain[-1].record
    if view not in (None, last.owner):
        raise RequestError(
            f"The previous response {previous[:80]!r} does not exist.",
            remedy="Send the whole conversation as 'input'.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if not last.has_ended:
        raise RequestError(
            f"The previous response is {last.status}.",
            remedy="Wait for its end, or cancel it.",
            param="previous_response_id",
            code="previous_response_running",
        )
    return chain


def not_found(response_id: str) -> NotFoundError:
    return NotFoundError(
        f"There is no response {response_id[:80]!r}.",
        remedy="Use the id of one that this key created in the last 30 days.",
        param="response_id",
        code="response_not_found",
    )
