"""A rank that is waited for is stuck only after a while without a pause; times are passed in."""

from workers.rank.stuck_ranks import STUCK_AFTER_S, StuckRanks


def test_only_ranks_that_are_waited_for_without_a_pause_are_stuck():
    ranks = StuckRanks()
    assert ranks.update((1, 2), 0.0) == ()
    assert ranks.update((1,), STUCK_AFTER_S / 2) == ()
    assert ranks.update((1, 2), STUCK_AFTER_S) == (1,), "rank 2 answered in between"
    assert ranks.update((), STUCK_AFTER_S + 0.1) == ()
    assert ranks.update((1,), STUCK_AFTER_S + 0.2) == ()
