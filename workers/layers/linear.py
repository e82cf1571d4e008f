"""Linear layers whose weight is divided over the tensor-parallel ranks.

Column-parallel layers divide output features; row-parallel layers divide input features and sum the partial results. So a block is one
column layer, something elementwise or per head, and one row layer: one all-reduce per block. Each parameter carries the `weight_loader`
that fills it from a checkpoint tensor and reads this rank's part only. How that part is kept and multiplied is the weight method's
business. Knows no checkpoint names and no files.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from workers.kernels.lora.rows import AdapterRows
from workers.kernels.lora.table import LoraTable, NewLoraTable
from workers.parallel.group import TensorParallel
from workers.quant.dense import DENSE, get_matrix
from workers.quant.method import WeightMethod, WeightSource, check_shape, new_weight
from workers.quant.quantized import dense_values
from workers.rank_shares import kv_heads_of_rank


@runtime_checkable
class FinishesLoading(Protocol):
    """A layer that prepares its weight for computing once every shard is loaded."""

    def finish_loading(self) -> None: ...


class MergedColumnParallelLinear(nn.Module):
    """Several column-parallel layers with the same input, computed as one.

    With output_sizes [("gate", 6), ("up", 6)] and two ranks, rank 1's weight holds rows 3-5 of "gate", then rows 3-5 of "up".
    rows: this rank's, of the shards that are not divided evenly, or of which several ranks hold the same.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[tuple[str | None, int]],
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        method: WeightMethod = DENSE,
        has_bias: bool = False,
        rows: Mapping[str | None, Sequence[slice]] | None = None,
        lora: NewLoraTable | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.method = method
        self.input_size = input_size
        self.output_sizes = dict(output_sizes)
        # {shard: this rank's rows of it in the checkpoint}, which lie here one after the other.
        self.rows: dict[str | None, tuple[slice, ...]] = {
            shard_id: tuple((rows or {}).get(shard_id) or (even_part(size, tp),)) for shard_id, size in output_sizes
        }
        self.output_sizes_per_rank = [sum(map(_length, self.rows[shard_id])) for shard_id, _ in output_sizes]
        method.create(
            self,
            sum(self.output_sizes_per_rank),
            input_size,
            weight_loader=self.load_shard,
            dtype=dtype,
            device=device,
        )
        num_rows = sum(self.output_sizes_per_rank)
        self.bias = new_weight((num_rows,), self.load_bias, dtype=dtype, device=device) if has_bias else None
        self.lora: LoraTable | None = None if lora is None else lora(input_size, self.output_sizes_per_rank)

    def forward(self, x: torch.Tensor, adapters: AdapterRows | None = None) -> torch.Tensor:
        # x: [num_tokens, input_size], the same on all ranks -> [num_tokens, sum(output_sizes_per_rank)]
        out = self.method.apply(self, x, self.bias)
        if self.lora is not None and adapters is not None:
            self.lora.add(out, x, adapters)
        return out

    def multiply_gated(self, x: torch.Tensor, adapters: AdapterRows | None = None) -> torch.Tensor | None:
        """silu(gate) * up of two shards of one size, in one kernel; None where there is none, or where the product is not all.

        -> [num_tokens, half of sum(output_sizes_per_rank)]
        """
        matrix = get_matrix(self)
        if matrix is None or self.bias is not None or (self.lora is not None and adapters is not None):
            return None
        return matrix.multiply_gated(x)

    def load_shard(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_sizes[shard_id], self.input_size))
        return sum(self.method.load(self, source[rows], target) for rows, target in self.places(shard_id))

    def load_bias(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_sizes[shard_id],))
        for rows, target in self.places(shard_id):
            parameter[target].copy_(dense_values(source[rows]))
        return sum(map(_length, self.rows[shard_id]))

    def places(self, shard_id: str | None) -> list[tuple[slice, slice]]:
        """This rank's rows of a shard: in the checkpoint, and here."""
        position = list(self.output_sizes).index(shard_id)
        ends = [sum(self.output_sizes_per_rank[:position])]
        for rows in self.rows[shard_id]:
            ends.append(ends[-1] + _length(rows))
        return list(zip(self.rows[shard_id], [slice(*ends) for ends in pairwise(ends)], strict=True))

    def share(self, shard_id: str | None) -> tuple[tuple[slice, ...], slice]:
        """What this rank has of a shard's matrix: its rows, one part after the other, and its columns."""
        return self.rows[shard_id], slice(None)

    def finish_loading(self) -> None:
        self.method.finish(self)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """Output features are divided: rank r computes the output_size / size rows from r * output_size / size on."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        method: WeightMethod = DENSE,
    ) -> None:
        super().__init__(input_size, [(None, output_size)], tp=tp, dtype=dtype, device=device, method=method)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections, shards "q", "k" and "v". Heads are divided: rank r computes the num_heads / size heads from
    r * num_heads / size on. Its key/value heads are those that they read, see `kv_heads_of_rank`: of 8 query and 2 key/value heads on 4
    ranks, rank 1 computes query heads 2 and 3 and key/value head 0.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        method: WeightMethod = DENSE,
        has_bias: bool = False,
        lora: NewLoraTable | None = None,
    ) -> None:
        heads = kv_heads_of_rank(tp.rank, tp.size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        kv_rows = [slice(first * head_dim, stop * head_dim) for first, stop in _runs(heads)]
        output_sizes = [("q", num_heads * head_dim), ("k", num_kv_heads * head_dim), ("v", num_kv_heads * head_dim)]
        super().__init__(
            hidden_size,
            output_sizes,
            tp=tp,
            dtype=dtype,
            device=device,
            method=method,
            has_bias=has_bias,
            rows={"k": kv_rows, "v": kv_rows},
            lora=lora,
        )


class RowParallelLinear(nn.Module):
    """Input features are divided, as a column-parallel layer leaves them; the ranks' partial results are summed, then a bias added.

    columns: this rank's inputs, where they are not divided evenly.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        method: WeightMethod = DENSE,
        has_bias: bool = False,
        columns: slice | None = None,
        lora: NewLoraTable | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.method = method
        self.input_size = input_size
        self.output_size = output_size
        self.columns = columns or even_part(input_size, tp)
        method.create(
            self, output_size, _length(self.columns), weight_loader=self.load_columns, dtype=dtype, device=device
        )
        self.bias = new_weight((output_size,), self.load_bias, dtype=dtype, device=device) if has_bias else None
        self.lora: LoraTable | None = None if lora is None else lora(_length(self.columns), [output_size])

    def forward(self, x: torch.Tensor, adapters: AdapterRows | None = None) -> torch.Tensor:
        # x: [num_tokens, number of this rank's columns] -> [num_tokens, output_size], the same on all ranks
        out = self.method.apply(self, x)
        if self.lora is not None and adapters is not None:
            # Of this rank's inputs, as the product itself.
            self.lora.add(out, x, adapters)
        total = self.tp.all_reduce(out)
        return total if self.bias is None else total + self.bias

    def load_bias(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_size,))
        parameter.copy_(dense_values(source[:]))
        return self.output_size

    def share(self, shard_id: str | None) -> tuple[tuple[slice, ...], slice]:
        """What this rank has of the matrix: its rows and its columns."""
        return (slice(None),), self.columns

    def load_columns(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_size, self.input_size))
        return self.method.load(self, source[:, self.columns], slice(None))

    def finish_loading(self) -> None:
        self.method.finish(self)


def even_part(size: int, tp: TensorParallel) -> slice:
    """This rank's part of `size` rows or columns that the ranks divide evenly."""
    assert size % tp.size == 0, f"{size} do not divide over {tp.size} ranks"
    share = size // tp.size
    return slice(tp.rank * share, (tp.rank + 1) * share)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbors together: heads 0, 0, 1, 2 are those from 0 to 1 and from 0 to 3."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1] = (runs[-1][0], head + 1)
        else:
            runs.append((head, head + 1))
    return runs
