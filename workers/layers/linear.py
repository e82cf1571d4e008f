"""Linear layers whose weight is divided over the tensor-parallel ranks.

Column-parallel layers divide output features; row-parallel layers divide input features and sum the partial results. So a block is one
column layer, something elementwise or per head, and one row layer: one all-reduce per block. Each parameter carries the `weight_loader`
that fills it from a checkpoint tensor and reads this rank's part only. How that part is kept and multiplied is the weight method's
business. Knows no checkpoint names and no files.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from workers.parallel.group import TensorParallel
from workers.quant.dense import DENSE
from workers.quant.method import WeightMethod, WeightSource, check_shape, new_weight
from workers.quant.quantized import dense_values


@runtime_checkable
class FinishesLoading(Protocol):
    """A layer that prepares its weight for computing once every shard is loaded."""

    def finish_loading(self) -> None: ...


class MergedColumnParallelLinear(nn.Module):
    """Several column-parallel layers with the same input, computed as one.

    With output_sizes [("gate", 6), ("up", 6)] and two ranks, rank 1's weight holds rows 3-5 of "gate", then rows 3-5 of "up".
    num_parts: of the shards that are divided into fewer parts than there are ranks. With 2 parts and four ranks, ranks 0 and 1 hold the
    same first part.
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
        num_parts: Mapping[str | None, int] | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.method = method
        self.input_size = input_size
        self.output_sizes = dict(output_sizes)
        self.num_parts = {shard_id: (num_parts or {}).get(shard_id, tp.size) for shard_id, _ in output_sizes}
        for shard_id, parts in self.num_parts.items():
            size = self.output_sizes[shard_id]
            assert size % parts == 0 and tp.size % parts == 0, (
                f"{size} rows of {shard_id}, {parts} parts, {tp.size} ranks"
            )
        self.output_sizes_per_rank = [size // self.num_parts[shard_id] for shard_id, size in output_sizes]
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, input_size], the same on all ranks -> [num_tokens, sum(output_sizes_per_rank)]
        return self.method.apply(self, x, self.bias)

    def load_shard(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_sizes[shard_id], self.input_size))
        rows, target = self._rows(shard_id)
        return self.method.load(self, source[rows], target)

    def load_bias(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_sizes[shard_id],))
        rows, target = self._rows(shard_id)
        parameter[target].copy_(dense_values(source[rows]))
        return target.stop - target.start

    def _rows(self, shard_id: str | None) -> tuple[slice, slice]:
        """This rank's rows of a shard: in the checkpoint, and here."""
        position = list(self.output_sizes).index(shard_id)
        start, num_rows = sum(self.output_sizes_per_rank[:position]), self.output_sizes_per_rank[position]
        part = self.tp.rank * self.num_parts[shard_id] // self.tp.size
        return slice(part * num_rows, (part + 1) * num_rows), slice(start, start + num_rows)

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
    r * num_heads / size on. With more ranks than key/value heads, several ranks have the same one: of 8 query and 2 key/value heads on 4
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
    ) -> None:
        parts = min(num_kv_heads, tp.size)
        output_sizes = [("q", num_heads * head_dim), ("k", num_kv_heads * head_dim), ("v", num_kv_heads * head_dim)]
        super().__init__(
            hidden_size,
            output_sizes,
            tp=tp,
            dtype=dtype,
            device=device,
            method=method,
            has_bias=has_bias,
            num_parts={"k": parts, "v": parts},
        )


class RowParallelLinear(nn.Module):
    """Input features are divided, as a column-parallel layer leaves them; the ranks' partial results are summed, then a bias added."""

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
    ) -> None:
        super().__init__()
        assert input_size % tp.size == 0, f"{input_size} columns do not divide over {tp.size} ranks"
        self.tp = tp
        self.method = method
        self.input_size = input_size
        self.output_size = output_size
        method.create(
            self, output_size, input_size // tp.size, weight_loader=self.load_columns, dtype=dtype, device=device
        )
        self.bias = new_weight((output_size,), self.load_bias, dtype=dtype, device=device) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, input_size / size], this rank's -> [num_tokens, output_size], the same on all ranks
        total = self.tp.all_reduce(self.method.apply(self, x))
        return total if self.bias is None else total + self.bias

    def load_bias(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_size,))
        parameter.copy_(dense_values(source[:]))
        return self.output_size

    def load_columns(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_size, self.input_size))
        num_columns = self.input_size // self.tp.size
        start = self.tp.rank * num_columns
        return self.method.load(self, source[:, start : start + num_columns], slice(None))

    def finish_loading(self) -> None:
        self.method.finish(self)
