"""How a quantised checkpoint stores its matrices, as its configuration says. Knows no files, no tensors and no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# Products compute in groups of so many inputs; a larger group repeats its scale.
SMALLEST_GROUP = 32
StoredMethod = Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "fp8", "gguf"]


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """label: for people, "GPTQ int4".

    layer_bits: what a weight takes on the CPU with its part of the scales, on average over the layers' matrices; head_bits: in the output
    head. None: they are kept in the engine's dtype there. file_bits: as layer_bits, in the file.
    dense_share: of the layers' weights, those that are kept in the engine's dtype, beside which layer_bits is the average of the others
    over all.
    group_size: how many neighbors share a scale; None for all of a row, and where groups are of inputs in another order.
    block_size: rows and inputs that share one, of 8-bit floats.
    needed: tensors that each matrix must have beside those of its format, "g_idx"; without them its numbers would mean others.
    """

    method: StoredMethod
    label: str
    layer_bits: float | None
    file_bits: float
    head_bits: float | None = None
    dense_share: float = 0.0
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    needed: tuple[str, ...] = ()

    @property
    def cpu_label(self) -> str:
        """`label`, and whether the CPU computes with another form."""
        return self.label if self.layer_bits is not None else f"{self.label} (on the CPU dense)"


def grouped_bits(num_bits: int, *, has_minima: bool, wide: bool, group_size: int = 32) -> float:
    """Bits of a weight in groups with scales, and minima, of 16 or, if they are wide, 32 bits: 4 bits with half scales take 4.5."""
    return num_bits + (32 if wide else 16) * (2 if has_minima else 1) / group_size


def why_not_divided(stored: StoredWeights, bounds: Mapping[str, Sequence[int]]) -> str | None:
    """bounds: where each rank's inputs begin, and where the last one's end, by a name in a sentence. A sentence on what would be cut within
    a group or block that has to stay whole; None if nothing is.
    """
    size = stored.group_size if stored.block_size is None else stored.block_size[1]
    if size is None or size % SMALLEST_GROUP:
        return None  # of all inputs or of few: these become dense, or keep their scale in every piece
    what = "groups" if stored.block_size is None else "blocks"
    for name, places in bounds.items():
        for place in places[1:-1]:
            if place % SMALLEST_GROUP:
                return (
                    f"The {what} of {size} inputs of the checkpoint's {stored.label} weights cannot be divided: a rank's part of the "
                    f"{name} would begin at {place}, which is not a multiple of {SMALLEST_GROUP}."
                )
    return None
