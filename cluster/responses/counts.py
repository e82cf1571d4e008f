"""What one gateway counts of its stored responses, for its metrics. Plain numbers: the service changes them, a scrape reads them."""

from collections import Counter
from dataclasses import dataclass, field

from cluster.responses.items import Status

ENDED: tuple[Status, ...] = ("completed", "incomplete", "failed", "cancelled")


@dataclass
class ResponseCounts:
    """`num_running`: those that this gateway runs now. `ended`: by status. The totals grow from the gateway's start on.

    `num_taken_over`: responses that another gateway, or this one before a restart, had begun. `num_resumed`: streams of responses that
    a client asked for again.
    """

    num_running: int = 0
    ended: Counter[Status] = field(default_factory=Counter)
    num_taken_over: int = 0
    num_resumed: int = 0
