"""A response as a line of a batch: its answer is in the batch's output file, and it is not stored besides.

Knows which fields a line cannot have. It may continue a stored response of its own key.
"""

from cluster.api.context import ApiContext
from cluster.api.endpoints.responses import prepare as responses
from cluster.api.endpoints.responses.access import find_chain
from cluster.api.endpoints.responses.conversation import items_before, items_of
from cluster.api.endpoints.responses.to_chat import asked
from cluster.api.generation.answering import Prepared
from cluster.api.request_context import RequestContext
from cluster.api.schemas.responses.request import InputItem, ResponseRequest
from cluster.batch.errors import StoreError
from workers.errors import ReplicaUnavailableError, RequestError


def check(api: ApiContext, body: ResponseRequest, context: RequestContext) -> None:
    """Checks all that needs no replica and no store. Raises RequestError."""
    for name, value in (("store", body.store), ("background", body.background)):
        if value:
            raise RequestError(
                f"A line of a batch cannot have {name!r}: its response is in the batch's output file only.",
                remedy="Remove it.",
                param=name,
            )
    responses.check(api, body, context)


async def prepare(api: ApiContext, body: ResponseRequest, context: RequestContext) -> Prepared:
    """Raises RequestError, and ReplicaUnavailableError for what may be there later: the model's facts, the store."""
    key = None if context.usage is None else context.usage.key
    view = None if key is None or key.admin else key.id
    before: list[InputItem] = []
    if body.previous_response_id is not None:
        try:
            before = items_before(await find_chain(api, body, view=view))
        except StoreError as e:
            raise ReplicaUnavailableError("The store of responses cannot be read now.") from e  # the line runs again
    prepared = await responses.prepare(api, body, [*before, *items_of(body.input)], context)
    record = responses.new_record(body, owner="")
    told = asked(body, prepared.choices[0].request.sampling, store=False)
    return responses.in_one_go(api, body, prepared, record, told)
