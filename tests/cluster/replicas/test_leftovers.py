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


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("team.chat-chat-r0-a1b2c3", True),
        ("team.chat-chat-r1-a1b2c3-rank0", True),
        ("team.chat-r0-a1b2c3", False),
        ("team.chat-chat-chat-r0-a1b2c3", False),  # of the deployment team.chat-chat
        ("team-r0-a1b2c3", False),
        ("team.code-code-r0-a1b2c3", False),
    ],
)
def test_names_of_one_of_several(name, ours):
    assert is_ours(name, "team.chat") is ours
    assert is_ours(name, "team") is (name == "team-r0-a1b2c3")


def test_replicas_to_keep_are_named_by_their_incarnation():
    keep = {("r0", "a1b2c3")}
    assert not is_ours("demo-r0-a1b2c3-rank0", "demo", keep)
    assert is_ours("demo-r0-ffffff-rank0", "demo", keep)
    assert is_ours("demo-r1-a1b2c3", "demo", keep)
