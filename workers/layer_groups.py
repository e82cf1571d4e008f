"""Which layers of a model share KV block ids: arithmetic on the layers' sliding windows. Knows no blocks and no torch.

A block of the KV cache holds the keys and values of some tokens for the layers of one group. All layers of a group have the same window,
so a block that the window has passed is of no use to any of them. All groups have the same number of layers, so that a block has the same
size in all of them and one pool serves all (vLLM's hybrid KV cache manager).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# What layers that do not exist may take of the memory, compared to those that do, and how much of that one group less is worth: each has
# its own row of a step's block table.
MAX_WASTE = 0.2
WASTE_PER_GROUP = 0.05


@dataclass(frozen=True)
class LayerGroup:
    """`window` counts the token itself; None is full attention. `layers`: their indices."""

    window: int | None
    layers: tuple[int, ...]


def group_layers(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """windows: of each layer. The groups with the widest window come first.

    Layers F W W W F W W W (F full, W a window of 32,768) give groups of two layers each: F(0 4), W(1 2), W(3 5), W(6 7).
    """
    counts = Counter(windows)
    widest_first = sorted(counts, key=_width, reverse=True)
    size = group_size([counts[window] for window in widest_first])
    groups = []
    for window in widest_first:
        layers = [i for i, each in enumerate(windows) if each == window]
        groups += [LayerGroup(window, tuple(layers[i : i + size])) for i in range(0, len(layers), size)]
    return tuple(groups)


def group_size(counts: Sequence[int]) -> int:
    """How many layers each group has room for, where so many layers share each window: few groups that waste little memory, of all layers
    and of those with the widest window, which come first and whose blocks are the most with long contexts.

    9 full layers and 27 with a window give groups of 9. 7 and 5 give groups of 7, the second with room for two layers that do not exist.
    """
    num_layers = sum(counts)

    def num_groups(size: int) -> int:
        return sum(-(-count // size) for count in counts)

    def wastes_little(size: int, count: int, groups: int) -> bool:
        return size * groups <= count * (1 + MAX_WASTE)

    sizes = [
        size
        for size in range(1, max(counts) + 1)
        if wastes_little(size, num_layers, num_groups(size)) and wastes_little(size, counts[0], -(-counts[0] // size))
    ]
    return min(sizes, key=lambda size: num_groups(size) * (1 + size / num_layers / WASTE_PER_GROUP))


def _width(window: int | None) -> float:
    return float("inf") if window is None else window
