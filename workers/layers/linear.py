"""Linear layers whose weight is divided over the tensor-parallel ranks, and the matrix product itself.

Column-parallel layers divide output features, row-parallel layers input features, summing the partial results. So a block is one
column layer, something elementwise or per head, and one row layer: one all-reduce per block. Each parameter carries the
`weight_loader` that fills it from a checkpoint tensor, reading this rank's part only. No biases.
Knows no checkpoint names and no files.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from workers.errors import CheckpointError
from workers.parallel.group import TensorParallel

Index = slice | tuple[slice, ...]
CAN_PACK = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)


class WeightSource(Protocol):
    """A tensor in a checkpoint that is read only where it is indexed. `name` says which tensor of which file, for messages."""

    name: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Index) -> torch.Tensor: ...


WeightLoader = Callable[[nn.Parameter, WeightSource, str | None], int]


def new_weight(
    shape: tuple[int, ...], weight_loader: WeightLoader, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Parameter:
    """An unfilled parameter. `weight_loader(parameter, source, shard_id)` copies this rank's part of `source` into it, converting the
    dtype, and returns how many of the parameter's elements it filled. Raises CheckpointError if the source is misshapen.
    """
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    setattr(parameter, "weight_loader", weight_loader)  # noqa: B010 (mypy knows no such attribute)
    return parameter


def load_whole(parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
    """The weight_loader of a parameter that every rank holds whole."""
    check_shape(source, tuple(parameter.shape))
    parameter.copy_(source[:])
    return parameter.numel()


def check_shape(source: WeightSource, shape: tuple[int, ...]) -> None:
    if tuple(source.shape) != shape:
        raise CheckpointError(
            f"{source.name} has shape {list(source.shape)}, but the model's configuration asks for {list(shape)}."
        )


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T. x: [num_tokens, in_features]; weight: [out_features, in_features], possibly packed by `pack`."""
    if not weight.is_mkldnn:
        return functional.linear(x, weight)
    # One row may take another path through oneDNN, with other rounding. Two rows cost the same, and then every row's result is
    # bit for bit independent of the rows beside it.
    rows = x.expand(2, -1) if x.shape[0] == 1 else x
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")[: x.shape[0]]


def pack(weight: nn.Parameter) -> nn.Parameter:
    """The weight laid out for oneDNN, if it is float32 on a CPU that has it; otherwise the weight itself.

    Measured against F.linear on one thread: 1.1 to 3.3 times as fast at 2 to 16 rows, 6 to 25 % faster at 256 rows; slower at
    one row on small matrices (256 x 768: 25 us, not 15 us) and at every row count on 256 x 256. What decides: a row's result
    no longer depends on the batch around it, so a request's tokens and log-probabilities do not either. Without packing (half types,
    a torch without oneDNN, CUDA) a request goes on elsewhere with the same seed, but the last bits of its logits may differ.
    """
    if not CAN_PACK or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    # The 16 is a typical number of rows, by which oneDNN chooses the layout.
    return nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16), requires_grad=False)


class MergedColumnParallelLinear(nn.Module):
    """Several column-parallel layers with the same input, computed as one.

    With output_sizes [("gate", 6), ("up", 6)] and two ranks, rank 1's weight holds rows 3-5 of "gate", then rows 3-5 of "up".
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[tuple[str | None, int]],
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        for shard_id, output_size in output_sizes:
            assert output_size % tp.size == 0, f"{output_size} rows of {shard_id} do not divide over {tp.size} ranks"
        self.tp = tp
        self.input_size = input_size
        self.output_sizes = dict(output_sizes)
        self.output_sizes_per_rank = [output_size // tp.size for _, output_size in output_sizes]
        shape = (sum(self.output_sizes_per_rank), input_size)
        self.weight = new_weight(shape, self.load_shard, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, input_size], the same on all ranks -> [num_tokens, sum(output_sizes_per_rank)]
        return linear(x, self.weight)

    def load_shard(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.output_sizes[shard_id], self.input_size))
        position = list(self.output_sizes).index(shard_id)
        start, num_rows = sum(self.output_sizes_per_rank[:position]), self.output_sizes_per_rank[position]
        target = parameter[start : start + num_rows]
        target.copy_(source[self.tp.rank * num_rows : (self.tp.rank + 1) * num_rows])
        return target.numel()

    def pack(self) -> None:
        self.weight = pack(self.weight)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """Output features are divided: rank r computes rows r * output_size / size and on."""

    def __init__(
        self, input_size: int, output_size: int, *, tp: TensorParallel, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(input_size, [(None, output_size)], tp=tp, dtype=dtype, device=device)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections, shards "q", "k", "v". Heads are divided: rank r computes heads r * num_heads / size and on."""

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
    ) -> None:
        assert num_kv_heads % tp.size == 0, f"{num_kv_heads} key/value heads do not divide over {tp.size} ranks"
        output_sizes = [("q", num_heads * head_dim), ("k", num_kv_heads * head_dim), ("v", num_kv_heads * head_dim)]
        super().__init__(hidden_size, output_sizes, tp=tp, dtype=dtype, device=device)


class RowParallelLinear(nn.Module):
    """Input features are divided, as a column-parallel layer leaves them; the ranks' partial results are summed."""

    def __init__(
        self, input_size: int, output_size: int, *, tp: TensorParallel, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        assert input_size % tp.size == 0, f"{input_size} columns do not divide over {tp.size} ranks"
        self.tp = tp
        self.input_size = input_size
        self.weight = new_weight((output_size, input_size // tp.size), self.load_columns, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, input_size / size], this rank's -> [num_tokens, output_size], the same on all ranks
        return self.tp.all_reduce(linear(x, self.weight))

    def load_columns(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        output_size, num_columns = parameter.shape
        check_shape(source, (output_size, self.input_size))
        start = self.tp.rank * num_columns
        parameter.copy_(source[:, start : start + num_columns])
        return parameter.numel()

    def pack(self) -> None:
        self.weight = pack(self.weight)
