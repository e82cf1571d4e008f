"""The interface between a batch's runner and whatever answers its lines.

Implemented by cluster/api/line_executor.py with the code of the endpoints, and by a simulation in tests and benchmarks.
"""

from typing import Protocol

from cluster.batch.records import Line, LineResult


class LineExecutor(Protocol):
    """`owner` is the batch's owner, as in BatchRecord."""

    @property
    def capacity(self) -> int:
        """How many lines are worth running at once right now, over all replicas. 0: none can run at the moment."""

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        """Returns the name of the body's model, before anything runs. Raises RequestError for a body (JSON) that can never be answered.

        Must be fast and must not wait: it is called for every line, perhaps a million of them, in a thread.
        """

    async def execute(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        """Answers one line; `seed` is for a body without one. A rejected request is a result too, with its status and body.

        Raises ReplicaUnavailableError and OverloadedError when a retry may succeed; the former with `crashed` if a replica died by itself
        while it worked on this line, and with `alone` if it worked on nothing else. When cancelled, aborts the request on its replica.
        """
