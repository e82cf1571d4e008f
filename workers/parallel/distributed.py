"""Collectives through torch.distributed: NCCL for ranks with a GPU, Gloo for CPU ranks on different hosts.

Data goes through the step group (NCCL, or Gloo on the CPU); messages and numbers of the host always through Gloo.
A small TCPStore on rank 0's host introduces the ranks and afterwards carries each rank's progress, so that a stuck rank can be named.
torch.distributed keeps one default process group per process, so a process is a rank of one DistributedGroup at a time.
Knows no model and no Ray.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from workers.errors import GroupError
from workers.parallel.group import sum_in_rank_order
from workers.parallel.interface import interface_towards

logger = logging.getLogger(__name__)

FOREVER = timedelta(days=365)  # an idle follower waits in broadcast; a leader that dies closes its connections
PROGRESS_INTERVAL_S = 0.5
INLINE_WORDS = 1024  # a message this long or shorter needs one Gloo broadcast, a longer one two


class DistributedGroup:
    """Tensor-parallel ranks, one process each, on any hosts; `group.TensorParallel` has the contract.

    NCCL runs asynchronously: a rank that never joins an NCCL all_reduce is found by NCCL's watchdog, which ends this process
    after `timeout_s`; `waiting_for` names the rank before that.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        device: torch.device | str,
        master_address: str,
        master_port: int,
        timeout_s: float = 30.0,
        join_timeout_s: float = 120.0,
        deterministic: bool = False,
    ) -> None:
        """Returns when every rank has joined at rank 0's `master_address:master_port`. Raises GroupError after `join_timeout_s`.

        deterministic: an all-reduced element's bits do not depend on its place in the tensor. On the CPU always so.
        """
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        # NCCL and Gloo add in an order that depends on the tensor's size and the element's place in it. The sum of two has only one.
        self._sums_in_rank_order = size > 2 and (deterministic or self.device.type == "cpu")
        self._timeout = timedelta(seconds=timeout_s)
        self._entered = 0  # collectives this rank has begun
        self._busy = False
        self._closed = threading.Event()
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            with _gloo_interface(interface_towards(master_address)):
                self._meet(master_address, master_port, backend, timedelta(seconds=join_timeout_s))
        except (RuntimeError, ValueError) as e:  # dist.DistError is a RuntimeError
            _destroy()
            raise GroupError(
                f"Rank {rank} of {size} could not join its group at {master_address}:{master_port}: {e}"
            ) from e
        self._reporter = threading.Thread(target=self._report_progress, name="tp-progress", daemon=True)
        self._reporter.start()
        logger.debug("rank %s of %s joined a %s group at %s:%s", rank, size, backend, master_address, master_port)

    def _meet(self, master_address: str, master_port: int, backend: str, join_timeout: timedelta) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # Left to itself the store listens on every interface, and it needs no token.
        listener = _listen(master_address, master_port) if self.rank == 0 else None
        self._store = dist.TCPStore(
            master_address,
            master_port,
            self.size,
            is_master=self.rank == 0,
            timeout=join_timeout,
            master_listen_fd=None if listener is None else listener.detach(),  # the store closes it
        )
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("tramontane", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=self._timeout,
            device_id=self.device if backend == "nccl" else None,
        )
        self._step = dist.group.WORLD
        self._host = self._step if backend == "gloo" else dist.new_group(backend="gloo", timeout=self._timeout)
        self._control = dist.new_group(backend="gloo", timeout=FOREVER)
        self._store.set_timeout(self._timeout)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place. x: any shape, contiguous, on `device`."""
        with self._collective():
            if not self._sums_in_rank_order:
                dist.all_reduce(x, group=self._step)
                return x
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x, group=self._step)
        sum_in_rank_order(parts, out=x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Concatenate along the last dimension on rank 0; None elsewhere."""
        with self._collective():
            if self.rank != 0:
                dist.gather(x, group=self._step)
                return None
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.gather(x, parts, group=self._step)
            return torch.cat(parts, dim=-1)

    def broadcast(self, message: np.ndarray | None) -> np.ndarray:
        """Rank 0 passes a 1-D int32 array; the others wait as long as rank 0 is connected."""
        head = torch.empty(1 + INLINE_WORDS, dtype=torch.int32)
        if self.rank == 0:
            assert message is not None and message.ndim == 1 and message.dtype == np.int32, (
                "rank 0 brings a 1-D int32 array"
            )
            head[0] = len(message)
            inline = message[:INLINE_WORDS]
            head[1 : 1 + len(inline)] = torch.from_numpy(np.ascontiguousarray(inline))
        with self._collective():
            dist.broadcast(head, src=0, group=self._control)
            length = int(head[0])
            if self.rank != 0:
                message = np.empty(length, np.int32)
                message[:INLINE_WORDS] = head[1 : 1 + length].numpy()
            assert message is not None
            if length > INLINE_WORDS:
                rest = torch.from_numpy(np.ascontiguousarray(message[INLINE_WORDS:]))
                dist.broadcast(rest, src=0, group=self._control)
                message[INLINE_WORDS:] = rest.numpy()
        return message

    def broadcast_tensor(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x on all ranks, in place. x: any shape, contiguous, on `device`."""
        with self._collective():
            dist.broadcast(x, src=0, group=self._step)
        return x

    def min(self, value: int) -> int:
        """The smallest value over ranks."""
        x = torch.tensor([value], dtype=torch.int64)
        with self._collective():
            dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self._host)
        return int(x)

    def waiting_for(self) -> tuple[int, ...]:
        """Ranks that have not entered this rank's running collective, as of their last report: up to PROGRESS_INTERVAL_S old."""
        if not self._busy or self._closed.is_set():
            return ()
        try:
            return self._not_entered(self._entered)
        except RuntimeError:  # the store ended with rank 0
            return (0,) if self.rank != 0 else ()

    def close(self) -> None:
        """Leaves the group. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._reporter.join()
        _destroy()

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        if self._closed.is_set():
            raise GroupError(f"The group is closed on rank {self.rank}.")
        self._entered += 1
        self._busy = True
        try:
            yield
        except RuntimeError as e:
            self._fail(e)
        self._busy = False

    def _fail(self, error: RuntimeError) -> NoReturn:
        try:
            self._closed.wait(2 * PROGRESS_INTERVAL_S)  # living ranks report once more
            missing = self._not_entered(self._entered)
        except RuntimeError:
            missing = (0,)
        self.close()
        raise GroupError(f"Rank {self.rank} of {self.size}: a collective failed: {error}", ranks=missing) from error

    def _report_progress(self) -> None:
        store = self._store.clone()  # type: ignore[attr-defined]  # a connection of its own
        while not self._closed.wait(PROGRESS_INTERVAL_S):
            try:
                store.set(f"entered/{self.rank}", str(self._entered))
            except RuntimeError as e:
                logger.debug("rank %s stops reporting progress: %s", self.rank, e)
                return

    def _not_entered(self, entered: int) -> tuple[int, ...]:
        others = [r for r in range(self.size) if r != self.rank]
        known = [r for r in others if self._store.check([f"entered/{r}"])]
        return tuple(r for r in others if r not in known or int(self._store.get(f"entered/{r}")) < entered)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as e:
        raise ValueError(f"nothing can listen there: {e.strerror}") from e


@contextlib.contextmanager
def _gloo_interface(name: str | None) -> Iterator[None]:
    """Gloo reads the interface from the environment; processes started from here must not inherit it."""
    if name is None or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
