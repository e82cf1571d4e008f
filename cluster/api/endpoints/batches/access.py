"""What the handlers of files and batches share: the store, whose a file or a batch is, and pages of a list.

Knows keys and query parameters. A key sees what it made; an admin, and everybody where no key is needed, sees everything. What is
somebody else's does not exist.
"""

import re

from aiohttp import web

from cluster.api.context import GATEWAY, Batches
from cluster.api.server.auth import KEY
from cluster.api.server.errors import NotFoundError
from cluster.batch.records import BatchRecord, FileRecord
from workers.errors import RequestError

_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


def batches_of(request: web.Request) -> Batches:
    """Raises RequestError where batches are switched off."""
    gateway = request.app[GATEWAY]
    if gateway.batches is None:
        raise RequestError(gateway.no_batches, code="batches_disabled")
    return gateway.batches


def owner_of(request: web.Request) -> str:
    """Whose what the request makes will be; "" where nobody needs a key."""
    key = request.get(KEY)
    return "" if key is None else key.id


def view_of(request: web.Request) -> str | None:
    """Whose files and batches the request may see; None: everybody's."""
    key = request.get(KEY)
    return None if key is None or key.admin else key.id


async def find_file(request: web.Request, file_id: str, *, param: str = "file_id") -> FileRecord:
    """Raises NotFoundError."""
    record = await batches_of(request).store.get_file(file_id) if _ID.fullmatch(file_id) else None
    if record is None or view_of(request) not in (None, record.owner):
        raise NotFoundError(f"There is no file {file_id[:80]!r}.", param=param, code="file_not_found")
    return record


async def find_batch(request: web.Request) -> BatchRecord:
    """The one that the path names. Raises NotFoundError."""
    batch_id = request.match_info["batch_id"]
    record = await batches_of(request).store.get_batch(batch_id) if _ID.fullmatch(batch_id) else None
    if record is None or view_of(request) not in (None, record.owner):
        raise NotFoundError(f"There is no batch {batch_id[:80]!r}.", param="batch_id", code="batch_not_found")
    return record


def check_query(request: web.Request, *known: str) -> None:
    """Raises RequestError for a parameter that would be ignored."""
    for name in request.query:
        if name not in known:
            raise RequestError(
                f"Unrecognized query parameter supplied: {name[:80]}", param=name[:80], code="unknown_parameter"
            )


def page_limit(request: web.Request, *, default: int, most: int) -> int:
    """Raises RequestError."""
    text = request.query.get("limit", str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= most:
        raise RequestError(f"'limit' must be a number from 1 to {most}.", param="limit", code="invalid_value")
    return int(text)


def page_after(request: web.Request) -> str | None:
    """Raises RequestError for what is no id at all; the store knows whether there is such a one."""
    after = request.query.get("after")
    if after is not None and not _ID.fullmatch(after):
        raise RequestError(
            "'after' must be an id that an earlier page ended with.", param="after", code="invalid_value"
        )
    return after
