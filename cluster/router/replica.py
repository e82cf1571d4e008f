"""The two seams below the router: the `Replica` protocol, and what the gateway knows about replicas that are not there.

cluster/replicas/client.py is a `Replica` over a socket; tests use one without an engine.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from workers.protocol import EngineFacts, GenerateRequest, LoadReport, StepFrame, TokenDelta


class Replica(Protocol):
    """One model replica, as the router sees it.

    drain_until: time.monotonic() at which running streams move elsewhere; None unless it is draining.
    is_leaving: it drains because its node is preempted. Streams move as soon as another replica has room; while no other is ready, it
    keeps serving.
    on_frame: called with every frame. A new listener gets the earlier content of the cache at once.
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
        """What start-up determined. Raises ReplicaUnavailableError before the first connection."""

    @property
    def load(self) -> LoadReport:
        """The newest report."""

    @property
    def condemned(self) -> str | None:
        """Why it will never be ready again, one sentence; None while it may recover."""

    def is_ready(self, now: float) -> bool:
        """Whether all ranks took part in a forward pass a moment ago. now: time.monotonic()."""

    def not_ready_reason(self, now: float) -> str | None:
        """One sentence that names the replica, and the stuck rank if there is one; None when ready."""

    def unhealthy_reason(self, now: float) -> str | None:
        """The same for /health, with the patience that a busy machine needs: None as well while it may be ready again in a moment."""

    def generate(
        self, request: GenerateRequest, *, take: Callable[[TokenDelta], bool] | None = None
    ) -> AsyncIterator[TokenDelta]:
        """An async generator of deltas, the last one with a finish_reason. Closing it aborts the request.

        take: asked about each delta that arrives while the generator's reader waits for it. A delta that it takes (True) is not yielded,
        which saves the switch to the reader's task. What it raises, the generator raises.
        Raises ReplicaUnavailableError when the replica is lost.
        """


@dataclass(frozen=True)
class Availability:
    """What the gateway knows beyond the replicas it is connected to.

    expected: a replica will come (it is starting, being replaced, or started on demand), so requests may wait.
    reason: why no replica is ready, one sentence.
    facts: of the served model, known even while no replica runs.
    scaled_to_zero: no replica runs on purpose; the next request starts one.
    """

    expected: bool = False
    reason: str | None = None
    facts: EngineFacts | None = None
    scaled_to_zero: bool = False
