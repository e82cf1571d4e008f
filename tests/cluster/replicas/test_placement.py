"""The arithmetic of placing, without Ray."""

from cluster.replicas.placement import fits_apart, holds, missing


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
