"""How a checkpoint stores a matrix, as its headers and configuration tell: the values that choose a method, without a weight read.

Knows no files, no names, no devices and no torch.
"""

from dataclasses import dataclass
from typing import Literal

NumBits = Literal[4, 8]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedForm:
    """Whole numbers in groups of inputs that share a scale, see `QuantizedTensor`. group_size: inputs.

    wide: scales, and minima, are float32, because float16 does not hold them. reordered: the groups are of inputs in another order.
    """

    num_bits: NumBits
    group_size: int
    has_minima: bool = False
    wide: bool = False
    reordered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8Form:
    """8-bit floats, see `Float8Tensor`. block_size: (rows, inputs) that share a scale; None is all of them."""

    block_size: tuple[int | None, int | None] = (None, None)


# None is dense.
Form = GroupedForm | Float8Form | None
