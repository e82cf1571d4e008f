"""What the handlers of files and batches share: the store, who may see a file or a batch, and pages of a list.

Knows keys and query parameters. A key sees what it created. An admin key sees everything, as do all clients where no key is needed.
Files and batches of other keys are answered with 404.
"""

import re

from aiohttp import web

from cluster.api.context import CONTEXT, Batches
from cluster.api.server.auth import KEY
from cluster.api.server.errors import NotFoundError
from cluster.batch.records import BatchRecord, FileRecord
from workers.errors import RequestError

_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


def batches_of(request: web.Request) -> Batches:
    """Raises RequestError if batches are disabled."""
    api = request.app[CONTEXT]
    if api.batches is None:
        raise RequestError(api.no_batches, code="batches_disabled")
    return api.batches


def owner_of(request: web.Request) -> str:
    """The key that will own what the request creates; "" where no key is needed."""
    key = request.get(KEY)
    return "" if key is None else key.id


def view_of(request: web.Request) -> str | None:
    """The key whose files and batches the request may see; None: all of them."""
    key = request.get(KEY)
    return None if key is None or key.admin else key.id


async def find_file(request: web.Request, file_id: str, *, param: str = "file_id") -> FileRecord:
    """Raises NotFoundError."""
    record = await batches_of(request).store.get_file(file_id) if _ID.fullmatch(file_id) else None
    if record is None or view_of(request) not in (None, record.owner):
        raise NotFoundError(f"There is no file {file_id[:80]!r}.", param=param, code="file_not_found")
    return record


async def find_batch(request: web.Request) -> BatchRecord:
    """The batch in the path. Raises NotFoundError."""
    batch_id = request.match_info["batch_id"]
    record = await batches_of(request).store.get_batch(batch_id) if _ID.fullmatch(batch_id) else None
    if record is None or view_of(request) not in (None, record.owner):
        raise NotFoundError(f"There is no batch {batch_id[:80]!r}.", param="batch_id", code="batch_not_found")
    return record


def check_query(request: web.Request, *known: str) -> None:
    """Raises RequestError for an unknown parameter, which would have no effect."""
    for name in request.query:
        if name not in known:
            raise RequestError(
                f"Unrecognized query parameter supplied: {name[:80]}.",
                remedy="Remove it, or correct its name.",
                param=name[:80],
                code="unknown_parameter",
            )


def page_limit(request: web.Request, *, default: int, most: int) -> int:
    """The number in `limit`, or in Mistral's `page_size`, of which there is only page 0. Raises RequestError."""
    if request.query.get("page", "0") != "0":
        raise RequestError(
            "'page' is not supported.", remedy="Send the last id of the page before as 'after'.", param="page"
        )
    text = request.query.get("limit", request.query.get("page_size", str(default)))
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= most:
        raise RequestError(
            f"'limit' is {text[:20]!r}.",
            remedy=f"Send a number from 1 to {most}.",
            param="limit",
            code="invalid_value",
        )
    return int(text)


def page_after(request: web.Request) -> str | None:
    """The id after which the page starts; the store knows whether it exists. Raises RequestError if it cannot be an id."""
    after = request.query.get("after")
    if after is not None and not _ID.fullmatch(after):
        raise RequestError(
            "'after' is not an id.",
            remedy="Send the 'last_id' of the previous page.",
            param="after",
            code="invalid_value",
        )
    return after
