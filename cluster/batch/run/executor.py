"""Where lines are answered: the seam between a batch's runner and whatever serves requests.

Implemented by cluster/api/batch_lines.py with the code of the endpoints, and by a simulation in tests and benchmarks.
"""

from typing import Protocol

from cluster.batch.records import Line, LineResult


class LineExecutor(Protocol):
    """`owner`: whose batch it is, as BatchRecord has it."""

    @property
    def capacity(self) -> int:
        """How many lines are worth having under way at once now, over all replicas. 0: none can run at the moment."""

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        """Before anything runs: raises RequestError for a body (JSON) that can never be answered, else returns its model's name.

        Quick and without waiting: it is called for each of maybe a million lines, in a thread.
        """

    async def execute(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        """Answers one line; `seed` is for a body that brings none. A request that is refused is a result too, with its status and body.

        Raises ReplicaUnavailableError and OverloadedError when it can be tried again later; the former with `crashed` if a replica died
        of itself while it worked on this line, `alone` if on nothing else. Cancelled: aborts the request on its replica.
        """
