"""What a rank answers to its replica's owner: typed values that cross processes. Imports no torch and no Ray."""

from dataclasses import dataclass, field

import msgspec

from workers.device.sensors import GpuReading
from workers.protocol import EngineFacts


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True):
    """Rank 0's answer to `address`, and what `join` is called with on all ranks: where they meet."""

    host: str
    port: int
    lifeline_port: int


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of weights: read so far, and in all. Both 0 before the total is known."""

    num_bytes_read: int = 0
    num_bytes_total: int = 0


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """Rank 0's answer to `start`: where gateways connect, and what start-up learned."""

    host: str
    port: int
    facts: EngineFacts


class RankStats(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's counters. Seconds are measured on the host; `all_reduce_s_total` is None where all-reduces run asynchronously (CUDA).

    `gpu`: what its GPU says now; None without one.
    """

    num_steps_total: int = 0
    step_s_total: float = 0.0
    num_all_reduces_total: int = 0
    all_reduce_s_total: float | None = None
    gpu: GpuReading | None = None


class RankEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a rank has ended, and why. reason: one sentence, or None while it runs and after an orderly `close`."""

    has_ended: bool
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class RankDescription:
    """Which rank this is and where it runs.

    node_id: Ray's, None without Ray. address, token, facts: only from a serving rank 0, everything needed to connect to the replica.
    """

    replica_id: str
    incarnation: str
    rank: int
    pid: int
    hostname: str
    phase: str  # joining, loading, starting, serving, ended
    node_id: str | None = None
    address: tuple[str, int] | None = None
    token: str | None = field(default=None, repr=False)
    facts: EngineFacts | None = None
