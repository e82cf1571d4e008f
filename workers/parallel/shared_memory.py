"""Collectives between CPU ranks of one host through a memory-mapped file.

Every rank owns a cache line with a counter that only grows, and two buffers. A collective is one or more rounds: write your part
into your buffer of the round's parity, advance your counter, wait for the others' counters, read their buffers.

    round     n - 2   n - 1   n            A rank writes in round n only after every counter reached n - 1, and a rank that
    buffer    even    odd     even         reached n - 1 has read all of n - 2: two buffers and one wait per round are enough.

With compiled kernels, an `Exchange`, all-reduce, gather and every wait are theirs, and a list of calls may contain them. Which ranks live,
and for how long to wait, is decided here in both cases. Knows nothing of the model. Needs Linux's /dev/shm, and x86, where stores become
visible in the order they were made: see shared_file.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import torch

from workers.errors import GroupError
from workers.parallel import shared_file
from workers.parallel.compiled import EVERY_OTHER, Exchange, GroupState, Kernel
from workers.parallel.group import sum_in_rank_order
from workers.parallel.shared_file import ARRIVED, BORN, CLOSED, COMPILED, LINE, MAGIC, PID, WORD
from workers.process_identity import born_at

logger = logging.getLogger(__name__)

OPERATIONS = ALL_REDUCE, GATHER, BROADCAST, MIN = "all_reduce", "gather", "broadcast", "min"

# Without compiled kernels, whose waits are in exchange.cpp.
SPINS = 50  # first polls, without a system call: a few us; more would starve the others where ranks outnumber cores
YIELD_S = 0.001  # then polls that offer the core to others; after that, sleeps of a sixteenth of the time waited so far
MIN_SLEEP_S = 0.00005
MAX_STEP_SLEEP_S = 0.0002  # within a step
MAX_IDLE_SLEEP_S = 0.001  # between steps
CHECK_INTERVAL_S = 0.05  # how often a sleeper checks for dead ranks and its own deadline


class SharedMemoryGroup:
    """Tensor-parallel ranks on one host; `group.TensorParallel` has the contract.

    Every rank sums in rank order, so all ranks hold bit-identical results. Any GroupError closes the group.
    """

    def __init__(
        self,
        name: str,
        *,
        rank: int,
        size: int,
        timeout_s: float = 30.0,
        join_timeout_s: float = 120.0,
        capacity_bytes: int = 1 << 20,
        exchange: Exchange | None = None,
    ) -> None:
        """Joins the group `name`, which must be unique to this incarnation of the replica; returns when every rank has joined.

        Rank 0 creates the file, and unlinks it once all have it mapped: no file is left, however the ranks end.
        A collective larger than `capacity_bytes` takes several rounds. exchange: used if all ranks have one. Raises GroupError after
        `join_timeout_s`.
        """
        assert 0 <= rank < size and capacity_bytes % (LINE * WORD) == 0, (rank, size, capacity_bytes)
        self.rank = rank
        self.size = size
        self.device = torch.device("cpu")
        self.timeout_s = timeout_s
        self._name = name
        self._capacity = capacity_bytes
        self._others = [r for r in range(size) if r != rank]
        self._exchange: Exchange | None = None  # joining does without
        self._closed = False

        path = shared_file.FOLDER / f"tramontane-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"
        header_words = (1 + size) * LINE
        num_bytes = header_words * WORD + 2 * size * (LINE * WORD + capacity_bytes)
        facts = (MAGIC, size, capacity_bytes)
        if rank == 0:
            memory = shared_file.create(path, num_bytes, facts)
        else:
            memory = shared_file.open_existing(path, facts, deadline=time.monotonic() + join_timeout_s)
        try:
            self._words = memoryview(memory).cast("q")
            self.state = GroupState(
                words=torch.frombuffer(memory, dtype=torch.uint8).data_ptr(),
                rank=rank,
                size=size,
                capacity_bytes=capacity_bytes,
                round=1,
            )
            # [size, 2] buffers, each preceded by a line that says what is in it
            slots = torch.frombuffer(memory, dtype=torch.uint8)[header_words * WORD :].view(size, 2, -1)
            self._tags = [
                [header_words + (2 * r + p) * (LINE + capacity_bytes // WORD) for p in (0, 1)] for r in range(size)
            ]
            self._buffers = {torch.uint8: slots[:, :, LINE * WORD :]}
            mine = shared_file.line(rank)
            self._words[mine + COMPILED] = exchange is not None
            self._words[mine + BORN] = born_at(os.getpid()) or 0
            self._words[mine + PID] = os.getpid()  # after BORN: a rank that reads a pid may compare the two
            self._words[mine + ARRIVED] = self.state.round
            self._wait(self._others, timeout_s=join_timeout_s, max_sleep_s=MAX_IDLE_SLEEP_S)
        finally:
            if rank == 0:
                path.unlink(missing_ok=True)
        if all(self._words[shared_file.line(r) + COMPILED] for r in range(size)):
            self._exchange = exchange
        logger.debug("rank %s of %s joined the shared-memory group %s", rank, size, name)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place. Half types are summed in fp32 and rounded once. x: any shape, contiguous."""
        if self._exchange is not None and (kernel := self._exchange.all_reduce.get(x.dtype)) is not None:
            assert x.is_contiguous(), "all_reduce needs a contiguous tensor"
            self._run(kernel, x.data_ptr(), x.numel())
            return x
        began_ns = time.monotonic_ns()

        def add_up(chunk: torch.Tensor, parts: list[torch.Tensor]) -> None:
            sum_in_rank_order(parts, out=chunk)

        self._take_rounds(ALL_REDUCE, x, add_up)
        self.state.num_all_reduces += 1
        self.state.all_reduces_ns += time.monotonic_ns() - began_ns
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Concatenate along the last dimension on rank 0; the others return without waiting. x: contiguous."""
        if self._exchange is not None:
            assert x.is_contiguous(), "gather needs a contiguous tensor"
            whole = x.new_empty((*x.shape[:-1], self.size * x.shape[-1])) if self.rank == 0 else None
            num_rows, address = x.shape[:-1].numel(), 0 if whole is None else whole.data_ptr()
            self._run(self._exchange.gather, address, x.data_ptr(), num_rows, x.shape[-1] * x.element_size())
            return whole
        if self.rank != 0:
            self._take_rounds(GATHER, x, None)
            return None
        received = [x, *(torch.empty_like(x) for _ in self._others)]
        done = 0

        def collect(chunk: torch.Tensor, parts: list[torch.Tensor]) -> None:
            nonlocal done
            for r in self._others:
                received[r].view(-1)[done : done + chunk.numel()].copy_(parts[r])
            done += chunk.numel()

        self._take_rounds(GATHER, x, collect)
        return torch.cat(received, dim=-1)

    def broadcast(self, message: np.ndarray | None) -> np.ndarray:
        """Rank 0 passes a 1-D int32 array and does not wait for readers; the others wait as long as rank 0 lives."""
        step = self._capacity // 4
        if self.rank == 0:
            assert message is not None and message.ndim == 1 and message.dtype == np.int32, (
                "rank 0 brings a 1-D int32 array"
            )
            for start in range(0, max(len(message), 1), step):
                parity = self._begin()
                self._words[self._tags[0][parity]] = len(message)
                chunk = torch.from_numpy(np.ascontiguousarray(message[start : start + step]))
                self._typed(torch.int32)[0, parity, : len(chunk)].copy_(chunk)
                self._arrive()
            return message
        assert message is None, f"rank {self.rank} brought a message to rank 0's broadcast"
        received = np.empty(0, np.int32)
        start = 0
        while start == 0 or start < len(received):
            self.state.round += 1
            self._arrive()
            self._wait([0], timeout_s=None if start == 0 else self.timeout_s, max_sleep_s=MAX_IDLE_SLEEP_S)
            parity = self.state.round & 1
            if start == 0:
                received = np.empty(self._words[self._tags[0][parity]], np.int32)
            chunk = torch.from_numpy(received[start : start + step])
            chunk.copy_(self._typed(torch.int32)[0, parity, : len(chunk)])
            start += step
        return received

    def broadcast_tensor(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x on all ranks, in place; rank 0 returns without waiting. x: any shape, contiguous."""

        def take(chunk: torch.Tensor, parts: list[torch.Tensor]) -> None:
            chunk.copy_(parts[0])

        self._take_rounds(BROADCAST, x, None if self.rank == 0 else take)
        return x

    def min(self, value: int) -> int:
        """The smallest value over ranks."""
        values = [value]

        def collect(_: torch.Tensor, parts: list[torch.Tensor]) -> None:
            values.extend(int(part) for part in parts)

        self._take_rounds(MIN, torch.tensor([value], dtype=torch.int64), collect)
        return min(values)

    @property
    def is_compiled(self) -> bool:
        """Whether a list of calls may contain its all-reduces and gathers; then `check` is for a list that ended early."""
        return self._exchange is not None

    def waiting_for(self) -> tuple[int, ...]:
        """Ranks that the collective now running still waits for. Safe to call from another thread."""
        n = self.state.awaited
        ranks = self._awaited_ranks() if n and not self._closed else ()
        return tuple(r for r in ranks if self._words[shared_file.line(r) + ARRIVED] < n)

    def check(self) -> None:
        """Raises GroupError if the compiled collective that is pending will never be done."""
        self._check(timeout_s=self.timeout_s)

    def close(self) -> None:
        """Tells the others that this rank has left. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.state.is_closed = 1
        self._words[shared_file.line(self.rank) + CLOSED] = 1
        self.state.awaited = 0

    def _run(self, kernel: Kernel, *arguments: int) -> None:
        """A compiled collective, to its end."""
        self._check_open()
        kernel(self.state.address, *arguments)
        while self.state.pending:
            self.check()
            kernel.unrecorded(self.state.address, *arguments)

    def _take_rounds(
        self, operation: str, x: torch.Tensor, read: Callable[[torch.Tensor, list[torch.Tensor]], None] | None
    ) -> None:
        """Rounds in which every rank writes its x; `read` gets a chunk of x and the same chunk of every rank, in rank order."""
        assert x.is_contiguous(), f"{operation} needs a contiguous tensor"
        flat = x.view(-1)
        step = self._capacity // x.element_size()
        tag = x.nbytes * len(OPERATIONS) + OPERATIONS.index(operation)
        for start in range(0, flat.numel(), step):
            chunk = flat[start : start + step]
            parity = self._begin()
            buffers = self._typed(x.dtype)[:, parity, : chunk.numel()]
            buffers[self.rank].copy_(chunk)
            self._words[self._tags[self.rank][parity]] = tag
            self._arrive()
            if read is None:
                continue
            self._wait(self._others, timeout_s=self.timeout_s, max_sleep_s=MAX_STEP_SLEEP_S)
            self._check_same_program()
            read(chunk, list(buffers))

    def _begin(self) -> int:
        """Starts a round in which this rank writes: waits until its buffer of the new round's parity is free; returns the parity."""
        self._wait(self._others, timeout_s=self.timeout_s, max_sleep_s=MAX_STEP_SLEEP_S)
        self.state.round += 1
        return self.state.round & 1

    def _arrive(self) -> None:
        if self._exchange is not None:
            self._exchange.arrive(self.state.address)
        else:
            self._words[shared_file.line(self.rank) + ARRIVED] = self.state.round

    def _typed(self, dtype: torch.dtype) -> torch.Tensor:
        """All buffers as [size, 2, elements] of `dtype`."""
        if dtype not in self._buffers:
            self._buffers[dtype] = self._buffers[torch.uint8].view(dtype)
        return self._buffers[dtype]

    def _wait(self, ranks: Sequence[int], *, timeout_s: float | None, max_sleep_s: float) -> None:
        """Returns when the counters of `ranks`, rank 0 or all others, have reached this rank's round. `timeout_s` None: as long as they
        live.
        """
        self._check_open()
        awaited_rank = EVERY_OTHER if ranks is self._others else 0
        if self._exchange is not None:
            self._exchange.await_round(self.state.address, awaited_rank)
            while self.state.pending:
                self._check(timeout_s=timeout_s)
                self._exchange.await_round(self.state.address, awaited_rank)
            return
        words, n, state = self._words, self.state.round, self.state
        state.awaited_rank, state.waits_since_ns, state.awaited = awaited_rank, time.monotonic_ns(), n
        started = time.monotonic()
        next_check = started + CHECK_INTERVAL_S
        for rank in ranks:
            index = shared_file.line(rank) + ARRIVED
            spins = 0
            while words[index] < n:
                spins += 1
                if spins < SPINS:
                    continue
                now = time.monotonic()
                if now - started < YIELD_S:
                    os.sched_yield()
                    continue
                if now >= next_check:
                    self._check(timeout_s=timeout_s)
                    next_check = now + CHECK_INTERVAL_S
                time.sleep(min(max(MIN_SLEEP_S, (now - started) / 16), max_sleep_s))
        state.awaited = 0

    def _awaited_ranks(self) -> Sequence[int]:
        return self._others if self.state.awaited_rank == EVERY_OTHER else (self.state.awaited_rank,)

    def _check_open(self) -> None:
        if self._closed:
            raise GroupError(f"The group {self._name} is closed on rank {self.rank}.")

    def _check(self, *, timeout_s: float | None) -> None:
        """In the middle of a wait: raises GroupError if it can only be in vain."""
        if self._closed:  # by another thread
            raise GroupError(f"The group {self._name} was closed on rank {self.rank}.")
        if self.state.is_written:
            self._check_same_program()
        ranks, n = self._awaited_ranks(), self.state.awaited
        self._check_alive(ranks)
        missing = tuple(r for r in ranks if self._words[shared_file.line(r) + ARRIVED] < n)
        waited_s = (time.monotonic_ns() - self.state.waits_since_ns) / 1e9
        if timeout_s is not None and waited_s > timeout_s and missing:
            self._fail(f"{_named(missing)} did not answer within {timeout_s:g} s.", missing)

    def _check_same_program(self) -> None:
        """Compares what this rank has written in its round with what others have."""
        parity = self.state.round & 1
        (num_bytes, index), *others = (
            (divmod(self._words[self._tags[r][parity]], len(OPERATIONS))) for r in (self.rank, *self._others)
        )
        for r, theirs in zip(self._others, others, strict=True):
            if self._words[shared_file.line(r) + ARRIVED] >= self.state.round and theirs != (num_bytes, index):
                self._fail(
                    f"Rank {self.rank} is in {OPERATIONS[index]} of {num_bytes} bytes, but rank {r} in {OPERATIONS[theirs[1]]} of "
                    f"{theirs[0]}; every rank must run the same program.",
                    (r,),
                )

    def _check_alive(self, ranks: Sequence[int]) -> None:
        words = self._words
        for rank in ranks:
            line = shared_file.line(rank)
            pid = words[line + PID]
            left = words[line + CLOSED] or (pid and born_at(pid) != words[line + BORN])
            # Checked last: a rank may arrive for the last time, then leave.
            if left and words[line + ARRIVED] < self.state.round:
                self._fail(f"Rank {rank} {'left the group' if words[line + CLOSED] else 'died'}.", (rank,))

    def _fail(self, message: str, ranks: tuple[int, ...]) -> NoReturn:
        self.close()
        raise GroupError(f"Tensor-parallel group {self._name}, rank {self.rank}: {message}", ranks=ranks)


def _named(ranks: Sequence[int]) -> str:
    return f"Rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
