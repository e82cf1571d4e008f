"""Which names in Ray belong to a deployment."""

import pytest

from cluster.replicas.leftovers import is_ours


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("demo-r0-a1b2c3", True),
        ("demo-r0-a1b2c3-apart", True),
        ("demo-r12-a1b2c3-rank3", True),
        ("demo-r0-a1b2c3-rank", False),
        ("demo-r0", False),
        ("demo2-r0-a1b2c3", False),
        ("demo-r0-r0-a1b2c3", False),  # of a deployment that is named demo-r0
        ("xdemo-r0-a1b2c3", False),
        ("tramontane-controller", False),
    ],
)
def test_names(name, ours):
    assert is_ours(name, "demo") is ours


def test_replicas_to_keep_are_named_by_their_incarnation():
    keep = {("r0", "a1b2c3")}
    assert not is_ours("demo-r0-a1b2c3-rank0", "demo", keep)
    assert is_ours("demo-r0-ffffff-rank0", "demo", keep)
    assert is_ours("demo-r1-a1b2c3", "demo", keep)
