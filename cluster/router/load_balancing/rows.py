"""Numbers about the replicas by slot, as a policy reads them: two snapshots, and which replicas accept requests.

Knows arrays and slots; no replica, no stream and no clock. table.py fills it.

There are two snapshots of the same replicas. Background sequences yield to all others within a step, so for online requests they do not
exist: not as sequences, not as tokens and not as KV blocks. A background sequence sees everything, and so takes only what is left.
"""

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from cluster.router.load_balancing.policy import Snapshot

OVERSHOOT = 0.25  # of max_num_seqs: sequences beyond it, so that a replica's scheduler always has a next one
_EMPTY_ROW = (False, 0, 0.0, 0.0, 0.0, 1)  # in the order of Snapshot's fields


class ReplicaRows:
    """All arrays have one length; `grow` before a slot is used. Rows of slots without a replica are not available."""

    def __init__(self) -> None:
        self._online = _empty(0)  # without background sequences
        self._everything = _empty(0)
        self._ready = np.zeros(0, np.bool_)  # ready and not draining
        self._accepts = np.zeros(0, np.bool_)  # the ready ones; if there is none, those whose node is preempted
        self._limit = np.zeros(0, np.int64)  # sequences at once; 0 while unknown

    @property
    def any_ready(self) -> bool:
        return bool(self._ready.any())

    @property
    def any_accepts(self) -> bool:
        return bool(self._accepts.any())

    def snapshot(self, *, background: bool) -> Snapshot:
        return self._everything if background else self._online

    def has_limit(self, slot: int) -> bool:
        return bool(self._limit[slot])

    def grow(self, num_slots: int) -> None:
        more = num_slots - len(self._ready)
        if more <= 0:
            return
        self._online = _joined(self._online, _empty(more))
        self._everything = _joined(self._everything, _empty(more))
        self._ready = np.concatenate([self._ready, np.zeros(more, np.bool_)])
        self._accepts = np.concatenate([self._accepts, np.zeros(more, np.bool_)])
        self._limit = np.concatenate([self._limit, np.zeros(more, np.int64)])

    def clear(self, slot: int) -> None:
        """The slot has no replica, or a new one of which nothing is known."""
        for rows in (self._online, self._everything):
            for field, empty in zip(fields(Snapshot), _EMPTY_ROW, strict=True):
                getattr(rows, field.name)[slot] = empty
        self._ready[slot] = self._accepts[slot] = False
        self._limit[slot] = 0

    def set_load(
        self,
        slot: int,
        *,
        background: bool,
        num_requests: int,
        pending_tokens: float,
        tokens_per_s: float,
        kv_usage: float,
    ) -> None:
        """One row of one snapshot."""
        rows = self.snapshot(background=background)
        rows.num_requests[slot] = num_requests
        rows.pending_tokens[slot] = pending_tokens
        rows.tokens_per_s[slot] = tokens_per_s
        rows.kv_usage[slot] = kv_usage
        rows.available[slot] = self._accepts[slot] and num_requests < self._limit[slot]

    def set_limit(self, slot: int, max_num_seqs: int) -> None:
        self._online.max_num_seqs[slot] = self._everything.max_num_seqs[slot] = max_num_seqs
        self._limit[slot] = max_num_seqs + max(1, int(max_num_seqs * OVERSHOOT))

    def set_ready(self, slot: int, ready: bool) -> None:
        self._ready[slot] = ready

    def set_accepts(self, slot: int, accepts: bool) -> None:
        self._accepts[slot] = accepts
        for rows in (self._online, self._everything):
            rows.available[slot] = accepts and rows.num_requests[slot] < self._limit[slot]

    def num_free(self, *, background: bool, among: NDArray[np.bool_] | None = None) -> int:
        """How many more sequences the ready replicas could take. background: next to everything that is there. among: the slots that
        count; None for all.
        """
        room = np.maximum(self._limit - self.snapshot(background=background).num_requests, 0)
        return int(room[self._ready if among is None else self._ready & among].sum())

    def estimated_wait_s(self, num_tokens: int, *, background: bool) -> float | None:
        """Until the ready replicas have computed what waits there and these tokens; None while no speed is known."""
        rows = self.snapshot(background=background)
        speed = float(rows.tokens_per_s[self._ready].sum())
        if speed <= 0:
            return None
        return (float(rows.pending_tokens[self._ready].sum()) + num_tokens) / speed


def with_available(snapshot: Snapshot, available: NDArray[np.bool_]) -> Snapshot:
    """The same rows with another `available`."""
    kept = {f.name: getattr(snapshot, f.name) for f in fields(Snapshot)}
    return Snapshot(**(kept | {"available": available}))


def _joined(first: Snapshot, second: Snapshot) -> Snapshot:
    columns = {f.name: np.concatenate([getattr(first, f.name), getattr(second, f.name)]) for f in fields(Snapshot)}
    return Snapshot(**columns)


def _empty(count: int) -> Snapshot:
    return Snapshot(
        available=np.zeros(count, np.bool_),
        num_requests=np.zeros(count, np.int64),
        pending_tokens=np.zeros(count),
        tokens_per_s=np.zeros(count),
        kv_usage=np.zeros(count),
        max_num_seqs=np.ones(count, np.int64),
    )
