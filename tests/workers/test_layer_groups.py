"""Which layers share KV block ids, in numbers that can be checked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.layer_groups import MAX_WASTE, LayerGroup, group_layers, group_size


def test_the_worked_example():
    window = 32_768
    assert group_layers([None, window, window, window] * 2) == (
        LayerGroup(None, (0, 4)),
        LayerGroup(window, (1, 2)),
        LayerGroup(window, (3, 5)),
        LayerGroup(window, (6, 7)),
    )


@pytest.mark.parametrize("window", [None, 4096])
def test_one_window_is_one_group(window):
    assert group_layers([window] * 32) == (LayerGroup(window, tuple(range(32))),)


@pytest.mark.parametrize(
    ("counts", "size"),
    [([32], 32), ([9, 27], 9), ([27, 9], 9), ([7, 5], 7), ([5, 7], 2), ([2, 6], 2), ([1, 5], 1), ([10, 10, 11], 11)],
)
def test_group_sizes(counts, size):
    assert group_size(counts) == size


@given(st.lists(st.sampled_from([None, 16, 4096]), min_size=1, max_size=40))
def test_every_layer_is_in_one_group_with_layers_of_its_window(windows):
    groups = group_layers(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)
    size = max(len(group.layers) for group in groups)
    assert size * len(groups) <= len(windows) * (1 + MAX_WASTE)
    widths = [float("inf") if group.window is None else group.window for group in groups]
    assert widths == sorted(widths, reverse=True)
    of_widest = [group for group in groups if group.window == groups[0].window]
    assert size * len(of_widest) <= windows.count(groups[0].window) * (1 + MAX_WASTE)
