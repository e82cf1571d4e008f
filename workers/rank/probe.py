"""A rank without a model: joins its group exactly as a serving rank does, then measures the all-reduce that serving would use.

What `tramontane doctor` runs where a replica would run. A plain class without Ray; imports torch late, as `worker` does. The calls are
address (rank 0 only), join, measure, in this order on all ranks at the same time. `where` reports what this rank is doing, at any time.
"""

import os
import socket
import statistics
import time
from typing import TYPE_CHECKING, Literal

import msgspec

from workers.errors import GroupError
from workers.rank.lifeline import Lifeline
from workers.rank.reports import Rendezvous

if TYPE_CHECKING:
    import torch

    from workers.parallel.group import TensorParallel

LATENCY_BYTES = 8 * 1024  # one token's hidden state of a 7B model in bf16
BANDWIDTH_BYTES = 16 * 2**20
NUM_WARM_UP, NUM_LATENCY, NUM_BANDWIDTH = 10, 100, 3


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """`collectives`: the implementation chosen. `gloo_interface`: None where Gloo chooses it by the host's own name."""

    collectives: Literal["none", "shared memory", "Gloo", "NCCL"]
    gloo_interface: str | None = None


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """`latency_s`: the median all-reduce of LATENCY_BYTES. `bus_bytes_per_s`: as nccl-tests defines it, comparable to a link's speed."""

    latency_s: float
    bus_bytes_per_s: float


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """`doing` ends a sentence that begins with the rank. `waiting_for`: ranks, as far as that is known."""

    doing: str
    waiting_for: tuple[int, ...] = ()


class ProbeRank:
    """One rank of the group `name`, which must be unique to this run. `timeout_s` limits the joining and each collective."""

    def __init__(
        self, rank: int, *, size: int, device: Literal["cpu", "cuda"], name: str, token: str, timeout_s: float
    ) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._name = name
        self._timeout_s = timeout_s
        self._doing = "has not begun"
        self._lost: str | None = None
        self._tp: TensorParallel | None = None
        self._lifeline = Lifeline(rank, token=token, on_lost=self._note_lost, on_failed=self._note_failed)

    def __repr__(self) -> str:
        return f"ProbeRank({self._name}/{self.rank})"

    def address(self, host: str) -> Rendezvous:
        """As RankWorker.address."""
        lifeline_port = self._lifeline.listen(host)
        with socket.socket() as s:
            s.bind((host, 0))
            return Rendezvous(host=host, port=s.getsockname()[1], lifeline_port=lifeline_port)

    def join(self, at: Rendezvous, *, same_host: bool) -> Joined:
        """As RankWorker.join. Raises GroupError naming the ranks that do not come, as far as they are known."""
        if self.rank != 0:
            self._doing = f"is connecting to rank 0's lifeline at {at.host}:{at.lifeline_port}"
            self._lifeline.connect((at.host, at.lifeline_port))
        self._doing = "is importing torch"
        from workers.native.exchange import native_exchange
        from workers.parallel.distributed import DistributedGroup
        from workers.parallel.interface import interface_towards
        from workers.parallel.join import join_group

        self._doing = f"is joining the group at {at.host}:{at.port}"
        tp = self._tp = join_group(
            rank=self.rank,
            size=self.size,
            device=self._device,
            replica_id=self._name,
            master_address=at.host,
            master_port=at.port,
            same_host=same_host,
            timeout_s=self._timeout_s,
            join_timeout_s=self._timeout_s,
            exchange=native_exchange() if self._device == "cpu" else None,
        )
        self._doing = "has joined the group"
        if not isinstance(tp, DistributedGroup):
            return Joined(collectives="none" if self.size == 1 else "shared memory")
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or interface_towards(at.host)
        return Joined(collectives="NCCL" if self._device == "cuda" else "Gloo", gloo_interface=interface)

    def measure(self) -> Measured:
        """All-reduces small and large tensors. Raises GroupError when one fails, does not end, or gives a wrong sum."""
        import torch

        assert self._tp is not None, "join comes before measure"
        self._doing = "is in its first all-reduce"
        small = torch.empty(LATENCY_BYTES // 4, device=self._tp.device)
        for _ in range(NUM_WARM_UP):
            self._timed(small)
        self._doing = f"is measuring all-reduces of {LATENCY_BYTES // 1024} KB"
        latency_s = statistics.median(self._timed(small) for _ in range(NUM_LATENCY))
        self._doing = f"is measuring all-reduces of {BANDWIDTH_BYTES // 2**20} MiB"
        large = torch.empty(BANDWIDTH_BYTES // 4, device=self._tp.device)
        self._timed(large)  # connections and buffers grow with the first
        seconds = statistics.median(self._timed(large) for _ in range(NUM_BANDWIDTH))
        self._doing = "has measured"
        bus_bytes_per_s = BANDWIDTH_BYTES / seconds * 2 * (self.size - 1) / self.size
        return Measured(latency_s=latency_s, bus_bytes_per_s=bus_bytes_per_s)

    def where(self) -> Where:
        """Callable from another thread while the others run."""
        tp = self._tp
        doing = self._doing if self._lost is None else f"{self._doing}; {self._lost}"
        return Where(doing=doing, waiting_for=tp.waiting_for() if tp else ())

    def close(self) -> None:
        """Leaves the group in order. Idempotent."""
        self._lifeline.close()
        if self._tp is not None:
            self._tp.close()

    def _timed(self, x: "torch.Tensor") -> float:
        """Seconds of one all-reduce of rank + 1 everywhere, whose sum is checked."""
        import torch

        assert self._tp is not None
        x.fill_(self.rank + 1)
        self._synchronize(x)
        began = time.perf_counter()
        x = self._tp.all_reduce(x)
        self._synchronize(x)
        elapsed = time.perf_counter() - began
        expected = self.size * (self.size + 1) / 2
        if not torch.all(x == expected):
            wrong = x[x != expected]
            raise GroupError(
                f"Rank {self.rank} of {self.size}: an all-reduce gave {wrong[0].item():g} instead of {expected:g} in "
                f"{wrong.numel()} of {x.numel()} elements."
            )
        return elapsed

    @staticmethod
    def _synchronize(x: "torch.Tensor") -> None:
        if x.is_cuda:
            import torch

            torch.cuda.synchronize()

    def _note_lost(self, rank: int, how: str) -> None:
        self._lost = f"rank {rank} was lost: {how}"

    def _note_failed(self, reason: str) -> None:
        self._lost = reason
