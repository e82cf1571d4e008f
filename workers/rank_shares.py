"""How a model's sizes are divided over tensor-parallel ranks: arithmetic only. Knows no weights and no torch.

Query heads are divided evenly. Key/value heads follow the query heads that read them, and several ranks may have the same one. Other sizes
are divided in units of 32, the smallest group of a quantised weight, so ranks may differ by one unit.
"""

import itertools
import math

UNIT = 32


def bounds_of(total: int, num_ranks: int) -> tuple[int, ...]:
    """Where each rank's part begins, and where the last one ends.

    Equal parts of whole units if there are such. Otherwise some ranks have a unit more than others, and the last unit may be shorter; a
    size with fewer units than ranks is divided in smaller ones. Of 160 over 3 ranks: (0, 32, 96, 160). Of 40 over 3: (0, 8, 24, 40).
    """
    assert 1 <= num_ranks <= total, (total, num_ranks)
    if total % (num_ranks * UNIT) == 0:
        return tuple(range(0, total + 1, total // num_ranks))
    unit = UNIT
    while total < num_ranks * unit:
        unit //= 2
    num_units = -(-total // unit)
    return tuple(min(rank * num_units // num_ranks * unit, total) for rank in range(num_ranks + 1))


def largest_share(total: int, num_ranks: int) -> int:
    bounds = bounds_of(total, num_ranks)
    return max(stop - start for start, stop in itertools.pairwise(bounds))


def kv_heads_of_rank(rank: int, num_ranks: int, *, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """The key/value heads that a rank computes, each for equally many neighbors among its query heads. One may appear more than once.

    Of 8 query and 2 key/value heads, rank 1 of 4 has the query heads 2 and 3, which read (0,). Of 12 and 4, rank 0 of 3 has the query heads
    0 to 3, which read 0, 0, 0 and 1: (0, 0, 0, 1).
    """
    per_rank, group = num_heads // num_ranks, num_heads // num_kv_heads
    return tuple(head // group for head in range(rank * per_rank, (rank + 1) * per_rank, _readers(per_rank, group)))


def num_kv_heads_of_rank(num_ranks: int, *, num_heads: int, num_kv_heads: int) -> int:
    per_rank = num_heads // num_ranks
    return per_rank // _readers(per_rank, num_heads // num_kv_heads)


def _readers(per_rank: int, group: int) -> int:
    """How many neighbors among a rank's query heads read the same key/value head, on every rank."""
    return math.gcd(per_rank, group)
