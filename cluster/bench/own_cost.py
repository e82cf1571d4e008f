"""What the load itself costs: how busy its process is, and how late its event loop comes. A busy client measures itself.

Knows the process it runs in; knows no requests.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

TICK_S = 0.02
BUSY_SHARE = 0.7  # of one core; above it events wait for each other
LATE_SHARE = 0.5  # of the median time per token, as the 99th percentile of lateness


@dataclass(slots=True)
class OwnCost:
    """late_s: how much later than asked each tick of the event loop came."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    late_s: list[float] = field(default_factory=list)

    @property
    def cpu_share(self) -> float:
        """Of one core."""
        return self.cpu_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def late_p99_s(self) -> float:
        return float(np.percentile(self.late_s, 99)) if self.late_s else 0.0


@contextlib.contextmanager
def watch_own_cost() -> Iterator[OwnCost]:
    """Filled when the block ends. Needs a running event loop."""
    cost = OwnCost()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    ticks = asyncio.create_task(_tick(cost.late_s))
    try:
        yield cost
    finally:
        ticks.cancel()
        cost.wall_s, cost.cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s


async def _tick(late_s: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        late_s.append(max(0.0, time.perf_counter() - due_s))


def warning(cost: OwnCost, *, gap_s: float | None) -> str | None:
    """One sentence when the client was the bottleneck, or may have been."""
    if cost.cpu_share > BUSY_SHARE:
        return (
            f"The client itself was the bottleneck: it used {cost.cpu_share:.0%} of a core. Run it on another machine, or with "
            f"fewer streams or requests a second."
        )
    if gap_s and cost.late_p99_s > LATE_SHARE * gap_s:
        return (
            f"The client had to wait for a core: 1% of its wake-ups were more than {cost.late_p99_s * 1e3:.1f} ms late, next to a "
            f"median time per token of {gap_s * 1e3:.1f} ms. Run it on another machine, or leave a core to it."
        )
    return None
