"""Which batch, and which request, a line belongs to. Set by the runner of a batch, in the task of each line."""

from contextvars import ContextVar
from typing import NamedTuple


class Origin(NamedTuple):
    """`created_by`: the traceparent of the request that created the batch; None if that was not traced."""

    batch_id: str
    created_by: str | None


origin_var: ContextVar[Origin | None] = ContextVar("origin", default=None)
