"""What the router asks of a replica, and what it is told of those that are not there.

Two seams as values and one Protocol: cluster/replicas/client.py is a `Replica` over a socket, tests have one without an engine.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from workers.protocol import EngineFacts, GenerateRequest, LoadReport, StepFrame, TokenDelta


class Replica(Protocol):
    """One model replica, as the router sees it.

    drain_until: time.monotonic() at which running streams move elsewhere; None while it is not draining.
    is_leaving: while it drains: its node goes away. Streams move as soon as another replica has room; while none is ready, it serves on.
    on_frame: the router's ear. Whoever sets it hears at once what was said before.
    """

    drain_until: float | None
    is_leaving: bool

    @property
    def on_frame(self) -> Callable[[StepFrame], None] | None: ...

    @on_frame.setter
    def on_frame(self, listener: Callable[[StepFrame], None] | None) -> None: ...

    @property
    def replica_id(self) -> str: ...

    @property
    def facts(self) -> EngineFacts:
        """What start-up learned. Raises ReplicaUnavailableError before the first connection."""

    @property
    def load(self) -> LoadReport:
        """The newest report."""

    @property
    def condemned(self) -> str | None:
        """Why it will never be ready again, in one sentence; None while it may be."""

    def is_ready(self, now: float) -> bool:
        """Whether all ranks took part in a forward pass a moment ago. now: time.monotonic()."""

    def not_ready_reason(self, now: float) -> str | None:
        """One sentence that names the replica, and the stuck rank if there is one; None when ready."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        """An async generator of deltas up to one with a finish_reason. Closing it aborts the request.

        Raises ReplicaUnavailableError when the replica is lost.
        """


@dataclass(frozen=True)
class Outlook:
    """What the gateway knows beyond the replicas it has."""

    expected: bool = False  # a replica will come (starting, being replaced, or woken by demand): requests may wait
    reason: str | None = None  # why none is ready, one sentence
    facts: EngineFacts | None = None  # of the model served, known even while no replica runs
    asleep: bool = False  # none runs on purpose: the next request starts one
