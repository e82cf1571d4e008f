"""The arithmetic of placing, and how long it waits; Ray is a fake."""

from types import SimpleNamespace

import pytest

from cluster.replicas import placement
from cluster.replicas.placement import fits_apart, holds, missing, place
from workers.errors import ConfigError


def test_holds():
    bundle = {"CPU": 1.0, "GPU": 1.0}
    assert holds({"CPU": 8.0, "GPU": 2.0}, bundle, 2)
    assert not holds({"CPU": 8.0, "GPU": 2.0}, bundle, 3)
    assert not holds({"CPU": 8.0}, bundle, 1)


def test_fits_apart_counts_whole_bundles_per_node():
    bundle = {"CPU": 2.0, "GPU": 1.0}
    assert fits_apart([{"CPU": 2.0, "GPU": 1.0}, {"CPU": 9.0, "GPU": 1.0}], bundle, 2)
    assert not fits_apart([{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}], bundle, 1), "halves make no whole"


def test_missing_names_the_resource_and_every_node():
    sentence = missing(
        free={"10.0.0.1": {"CPU": 3.0}, "10.0.0.2": {"CPU": 8.0, "GPU": 1.0}},
        total={"10.0.0.1": {"CPU": 8.0, "GPU": 4.0}, "10.0.0.2": {"CPU": 8.0, "GPU": 1.0}},
        bundle={"CPU": 1.0, "GPU": 1.0},
        count=4,
    )
    assert sentence == (
        "Needed: 4 ranks with 1 CPU and 1 GPU each. Nodes: 10.0.0.1 has 3 of 8 CPU free, 0 of 4 GPU free; "
        "10.0.0.2 has 8 of 8 CPU free, 1 of 1 GPU free."
    )


def test_missing_says_when_there_is_no_node():
    assert missing({}, {}, {"CPU": 1.0}, 1) == "Needed: one rank with 1 CPU. Nodes: none."


@pytest.fixture
def ray_with_one_gpu(monkeypatch):
    """A cluster of one node, on which two ranks never find room."""
    node = {"NodeID": "n1", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}
    monkeypatch.setattr(placement, "ray", SimpleNamespace(nodes=lambda: [node]))
    monkeypatch.setattr(placement, "available_resources", lambda: {"n1": node["Resources"]})
    monkeypatch.setattr(placement, "placement_group", lambda *_, **options: options["name"])
    monkeypatch.setattr(placement, "placement_group_table", lambda _: {"state": "PENDING"})


@pytest.mark.parametrize(
    ("device", "remedy"), [("cuda", "or use --device cpu."), ("cpu", "or lower --tensor-parallel-size.")]
)
async def test_ranks_that_find_no_room_are_told_what_is_missing(ray_with_one_gpu, monkeypatch, device, remedy):
    monkeypatch.setattr(placement, "REASON_INTERVAL_S", 0.02)
    gang = SimpleNamespace(device=device, tensor_parallel_size=2 if device == "cuda" else 5)
    groups, reasons = [], []
    with pytest.raises(ConfigError, match=r"had no room for the replica within 0\.1 s\. Needed: \d ranks") as refused:
        await place("r0", gang, timeout_s=0.1, on_group=groups.append, on_waiting=reasons.append)
    assert groups == ["r0"], "the caller removes it"
    assert refused.value.remedy.startswith("Start Ray on more nodes") and refused.value.remedy.endswith(remedy)
    assert reasons and all(r.startswith("Needed: ") for r in reasons), "while it waits, it says for what"
