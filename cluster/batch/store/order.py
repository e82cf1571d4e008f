"""The order in which a batch's lines run: prompts that start alike together, long lines early. Pure; knows no database.

Lines of one group run together, so that the prefix cache computes their common prefix once. Groups with a long line come first (by length
classes, each twice the one before), because a long line that starts last would run alone at the end. Within a class the group with the
most work comes first; within a group long lines come first. `order` is the specification that tests compare with: the stores sort by the
same keys in the database, so that a million lines need no memory here.

    lines (group, tokens):  (a, 90) (b, 10) (a, 20) (b, 12) (c, 100)    classes: a 7, b 4, c 7; sums: a 110, b 22, c 100
    order:                  (a, 90) (a, 20) (c, 100) (b, 12) (b, 10)
"""

from collections.abc import Iterable

from cluster.batch.records import Line


def length_class(num_tokens: int) -> int:
    """0 for no tokens, then one more with each doubling."""
    return num_tokens.bit_length()


def order(lines: Iterable[Line]) -> list[Line]:
    """The lines in the order of execution. Does not set `position`."""
    kept = list(lines)
    longest: dict[int, int] = {}
    sums: dict[int, int] = {}
    for line in kept:
        key = line.group_key
        longest[key] = max(longest.get(key, 0), length_class(line.num_tokens))
        sums[key] = sums.get(key, 0) + line.num_tokens
    return sorted(kept, key=lambda x: (-longest[x.group_key], -sums[x.group_key], x.group_key, -x.num_tokens, x.number))
