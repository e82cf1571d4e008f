"""Which replica holds which KV blocks, as reported: how much of a prompt each could take from its cache.

Knows replicas as slots (small integers assigned by its owner) and blocks by their `hash_block`. Knows no load, no clock and no tokens.
The holders of a block are the bits of one Python int, so a prompt is matched against all replicas at once: about 0.1 us per block for
1,000 replicas.

Window arithmetic, with block_size 4 and W = 6: the query after a prefix sees the 5 tokens before it, which lie in the prefix's last
ceil(5 / 4) = 2 blocks, whatever its length. A replica that evicted block 0 and holds blocks 1 and 2 can start after 3 blocks.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import and_

import numpy as np
from numpy.typing import NDArray

from workers.protocol import CacheEvents

FEW_BITS = 8  # up to this many are set one by one; more are unpacked at once


def window_blocks(sliding_window: int | None, block_size: int) -> int | None:
    """How many blocks the query after a prefix of whole blocks needs; None: all of them."""
    if sliding_window is None:
        return None
    return max(1, -(-(sliding_window - 1) // block_size))


class PrefixIndex:
    """Slots must be small: arrays are as long as the highest slot. A removed slot may be added again."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}  # of each block held anywhere: bit i is slot i
        self._held: dict[int, set[bytes]] = {}
        self._bits: list[int] = []  # 1 << slot; blocks with one holder, which most are, share these objects

    @property
    def num_slots(self) -> int:
        """The length of what `match` returns: one more than the highest slot ever added."""
        return len(self._bits)

    @property
    def num_blocks(self) -> int:
        """Distinct blocks held by at least one slot."""
        return len(self._holders)

    def num_held(self, slot: int) -> int:
        return len(self._held[slot])

    def add(self, slot: int) -> None:
        """Adds a replica that holds nothing yet."""
        assert slot not in self._held, f"slot {slot} is taken"
        self._held[slot] = set()
        self._bits += [1 << i for i in range(len(self._bits), slot + 1)]

    def remove(self, slot: int) -> None:
        """Forgets the replica and all its blocks. Unknown slots are ignored."""
        self._drop(slot, self._held.pop(slot, set()))

    def apply(self, slot: int, events: CacheEvents) -> None:
        """Applies the changes of the replica's cache in the order that CacheEvents states."""
        held, holders, bit = self._held[slot], self._holders, self._bits[slot]
        if events.reset:
            self._drop(slot, held)
            held.clear()
        lost = held.intersection(events.evicted)
        self._drop(slot, lost)
        held -= lost
        held.update(events.stored)
        for block in events.stored:
            others = holders.get(block)
            holders[block] = bit if others is None else others | bit

    def match(self, hashes: Sequence[bytes], *, window_blocks: int | None) -> NDArray[np.int64]:
        """By slot, shape [num_slots]: the number of leading blocks a request could skip, as KVCacheManager.find_prefix decides.

        hashes: of every full block the request may take from a cache, in order; its last token is always computed, so there are
        (num_tokens - 1) // block_size of them. window_blocks: see the function of that name.
        """
        lengths = np.zeros(self.num_slots, np.int64)
        if window_blocks is None:
            matched = self._leading_runs(hashes)
        else:
            matched = self._windowed_runs(hashes, window_blocks)
        for length, slots in matched:
            self._fill(lengths, slots, length)
        return lengths

    def _leading_runs(self, hashes: Sequence[bytes]) -> Iterator[tuple[int, int]]:
        """(length, slots with a longest leading run of that length), until no slot is left."""
        get = self._holders.get
        running = 0
        for length, block in enumerate(hashes):
            holders = get(block, 0)
            still = running & holders if length else holders
            if still != running:
                if length:
                    yield length, running & ~still
                running = still
            if not running:
                return
        yield len(hashes), running

    def _windowed_runs(self, hashes: Sequence[bytes], window: int) -> Iterator[tuple[int, int]]:
        """(length, slots that hold the last `window` blocks of a prefix of that length and of no longer one)."""
        get = self._holders.get
        able = _sliding_and([get(block, 0) for block in hashes], window)
        found = 0
        for length in range(len(hashes), 0, -1):
            slots = able[length - 1]
            if slots:
                new = slots & ~found
                if new:
                    yield length, new
                    found |= new

    def _fill(self, lengths: NDArray[np.int64], slots: int, length: int) -> None:
        """lengths[i] = length for every bit i of `slots`."""
        num_slots = slots.bit_count()
        if num_slots > FEW_BITS:
            packed = np.frombuffer(slots.to_bytes(-(-len(lengths) // 8), "little"), np.uint8)
            lengths[np.unpackbits(packed, count=len(lengths), bitorder="little").view(np.bool_)] = length
            return
        for _ in range(num_slots):
            highest = slots.bit_length() - 1
            lengths[highest] = length
            slots ^= self._bits[highest]

    def _drop(self, slot: int, blocks: set[bytes]) -> None:
        holders, bit = self._holders, self._bits[slot] if blocks else 0
        for block in blocks:
            others = holders[block] ^ bit
            if others:
                holders[block] = others
            else:
                del holders[block]


def _sliding_and(masks: list[int], window: int) -> list[int]:
    """At i: the AND of masks[max(0, i - window + 1) : i + 1], with three ANDs per element whatever the window.

    Van Herk and Gil-Werman: cut the list into pieces of `window`; every window is the tail of one piece and the head of the next.
    """
    heads: list[int] = []
    tails: list[int] = []
    for start in range(0, len(masks), window):
        piece = masks[start : start + window]
        heads += accumulate(piece, and_)
        tails += reversed(list(accumulate(reversed(piece), and_)))
    # The window that ends at i >= window starts at i - window + 1; the heads of the first piece are complete windows.
    return heads[:window] + list(map(and_, tails[1:], heads[window:]))
