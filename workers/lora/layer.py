"""A linear layer as adapters see it: the modules that it joins, which part of each is this rank's, and the table of its slots."""

from dataclasses import dataclass

from workers.kernels.lora.table import LoraTable


@dataclass(frozen=True, slots=True)
class LoraModule:
    """name: as PEFT's, such as q_proj. This rank has these rows and columns of its weight, so these rows of B and columns of A."""

    name: str
    rows: tuple[slice, ...]
    columns: slice

    def share_of(self, outputs: int, inputs: int) -> tuple[int, int]:
        """How many rows and columns these are, of a weight of that shape."""
        num_rows = sum(len(range(*part.indices(outputs))) for part in self.rows)
        return num_rows, len(range(*self.columns.indices(inputs)))


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """layer: of the decoder, from 0 on. modules: in the order of the table's shards."""

    layer: int
    modules: tuple[LoraModule, ...]
    table: LoraTable
