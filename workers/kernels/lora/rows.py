"""Which rows of a step have which adapter. Knows slots, the places of adapters on the device; no names of adapters and no requests."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Both int32 on the device, see `group_rows`. The same shapes in all steps with as many tokens: a graph can repeat them."""

    order: torch.Tensor  # [num_tokens]
    starts: torch.Tensor  # [num_slots + 1]


def group_rows(slots: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of slot s are order[starts[s]:starts[s + 1]]. The rest of `order` is 0 and means nothing.

    slots: [num_tokens] int32, -1 for the base model. With slots [2, -1, 0, 2] of 3 the order is [2, 0, 3, 0], and starts [0, 1, 1, 3]:
    slot 0 has row 2, slot 1 none, slot 2 rows 0 and 3.
    """
    order, starts = np.zeros(len(slots), dtype=np.int32), np.zeros(num_slots + 1, dtype=np.int32)
    (rows,) = np.nonzero(slots >= 0)
    if len(rows):
        order[: len(rows)] = rows[np.argsort(slots[rows], kind="stable")]
        starts[1:] = np.cumsum(np.bincount(slots[rows], minlength=num_slots))
    return order, starts
