"""Linear layers whose weight is divided over the tensor-parallel ranks.

Column-parallel layers divide output features; row-parallel layers divide input features and sum the partial results. So a block is one
column layer, something elementwise or per head, and one row layer: one all-reduce per block. Each parameter carries the `weight_loader`
that fills it from a checkpoint tensor and reads this rank's part only. How that part is kept and multiplied is the weight method's
business. No biases. Knows no checkpoint names and no files.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from workers.parallel.group import TensorParallel
from workers.quant.dense import DENSE
from workers.quant.method import WeightMethod, WeightSource, check_shape


@runtime_checkable
class FinishesLoading(Protocol):
    """A layer that prepares its weight for computing once every shard is loaded."""

    def finish_loading(self) -> None: ...


class MergedColumnParallelLinear(nn.Module):
    """Several column-parallel layers with the same input, computed as one.

    With output_sizes [("gate", 6), ("up", 6)] and two ranks, rank 1's weight holds rows 3-5 of "gate", then rows 3-5 of "up".
    """

    weight: nn.Parameter

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[tuple[str | None, int]],
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        method: WeightMethod = DENSE,
    ) -> None:
        super().__init__()
        for shard_id, output_size in output_sizes:
            assert output_size % tp.size == 0, f"{output_size} rows of {shard_id} do not divide over {tp.size} ranks"
        self.tp = tp
        self.method = method
        self.input_size = input_size
        self.output_sizes = dict(output_sizes)
        self.output_sizes_per_rank = [output_size // tp.size for _, output_size in output_sizes]
        method.create(
            self,
            sum(self.output_sizes_per_rank),
            input_size,
            weight_loader=self.load_shard,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, input_size], the same on all ranks -> [num_tokens, sum(output_sizes_per_rank)]
        return self.method.apply(self, x)

    def load_shard(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_sizes[shard_id], self.input_size))
        position = list(self.output_sizes).index(shard_id)
        start, num_rows = sum(self.output_sizes_per_rank[:position]), self.output_sizes_per_rank[position]
        values = source[self.tp.rank * num_rows : (self.tp.rank + 1) * num_rows]
        return self.method.load(self, values, slice(start, start + num_rows))

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
    r * num_heads / size on.
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
    ) -> None:
        assert num_kv_heads % tp.size == 0, f"{num_kv_heads} key/value heads do not divide over {tp.size} ranks"
        output_sizes = [("q", num_heads * head_dim), ("k", num_kv_heads * head_dim), ("v", num_kv_heads * head_dim)]
        super().__init__(hidden_size, output_sizes, tp=tp, dtype=dtype, device=device, method=method)


class RowParallelLinear(nn.Module):
    """Input features are divided, as a column-parallel layer leaves them; the ranks' partial results are summed."""

    weight: nn.Parameter

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
        super().__init__()
        assert input_size % tp.size == 0, f"{input_size} columns do not divide over {tp.size} ranks"
        self.tp = tp
        self.method = method
        self.input_size = input_size
        self.output_size = output_size
        method.create(
            self, output_size, input_size // tp.size, weight_loader=self.load_columns, dtype=dtype, device=device
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, input_size / size], this rank's -> [num_tokens, output_size], the same on all ranks
        return self.tp.all_reduce(self.method.apply(self, x))

    def load_columns(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_size, self.input_size))
        num_columns = self.input_size // self.tp.size
        start = self.tp.rank * num_columns
        return self.method.load(self, source[:, start : start + num_columns], slice(None))

    def finish_loading(self) -> None:
        self.method.finish(self)
