"""Each size is divided completely, in whole units as far as they go, and no rank has more than one unit more than another."""

import itertools

import pytest

from workers.rank_shares import UNIT, bounds_of, kv_heads_of_rank, largest_share, num_kv_heads_of_rank


def test_the_worked_examples():
    assert bounds_of(160, 3) == (0, 32, 96, 160)
    assert bounds_of(40, 3) == (0, 8, 24, 40)
    assert bounds_of(1536, 3) == (0, 512, 1024, 1536)
    assert kv_heads_of_rank(1, 4, num_heads=8, num_kv_heads=2) == (0,)
    assert kv_heads_of_rank(0, 3, num_heads=12, num_kv_heads=4) == (0, 0, 0, 1)


@pytest.mark.parametrize("total", [9, 40, 98, 1536, 1550, 11_008, 14_336])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 9])
def test_shares_differ_by_one_unit_at_most(total, num_ranks):
    bounds = bounds_of(total, num_ranks)
    shares = [stop - start for start, stop in itertools.pairwise(bounds)]
    assert len(shares) == num_ranks and bounds[0] == 0 and bounds[-1] == total
    assert min(shares) > 0 and max(shares) == largest_share(total, num_ranks)
    if total >= num_ranks * UNIT:
        assert all(place % UNIT == 0 for place in bounds[:-1])
        assert max(shares) - min(shares[:-1] or shares) <= UNIT
    if total % (num_ranks * UNIT) == 0:
        assert len(set(shares)) == 1


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (12, 4), (12, 6), (8, 2), (32, 8), (6, 6), (5, 1)])
def test_every_query_head_reads_its_own_key_value_head(num_heads, num_kv_heads):
    for num_ranks in (n for n in range(1, num_heads + 1) if num_heads % n == 0):
        per_rank = num_heads // num_ranks
        for rank in range(num_ranks):
            held = kv_heads_of_rank(rank, num_ranks, num_heads=num_heads, num_kv_heads=num_kv_heads)
            assert len(held) == num_kv_heads_of_rank(num_ranks, num_heads=num_heads, num_kv_heads=num_kv_heads)
            # As attention computes it: equally many neighbors read each of the heads that the rank has.
            read = [held[i * len(held) // per_rank] for i in range(per_rank)]
            assert read == [head * num_kv_heads // num_heads for head in range(rank * per_rank, (rank + 1) * per_rank)]
