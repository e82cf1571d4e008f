"""Divided layers compute what whole layers compute, and each rank loads its own slices only."""

import pytest
import torch
from support.ranks.rank_threads import run_ranks
from torch.nn.functional import embedding
from torch.nn.functional import linear as plain_linear

from workers.errors import CheckpointError
from workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from workers.layers.linear import (
    ColumnParallelLinear,
    FinishesLoading,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from workers.parallel.group import SingleRank
from workers.quant.method import new_weight

CPU = {"dtype": torch.float32, "device": "cpu"}
SIZES = pytest.mark.parametrize("size", [1, 2, 4])


class Source:
    """A whole tensor that notes how many elements were read."""

    def __init__(self, tensor):
        self.name = "Tensor 'w' of file"
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.num_read = 0

    def __getitem__(self, index):
        part = self.tensor[index]
        self.num_read += part.numel()
        return part


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load(layer, tensor, shard_id=None):
    source = Source(tensor)
    num_filled = layer.weight.weight_loader(layer.weight, source, shard_id)
    assert source.num_read <= num_filled, "read more than this rank's part"
    return num_filled


@SIZES
def test_column_then_row_is_the_whole_product(size):
    a, b, x = weight(24, 16, seed=1), weight(10, 24, seed=2), weight(5, 16, seed=3)

    def program(tp):
        column = ColumnParallelLinear(16, 24, tp=tp, **CPU)
        row = RowParallelLinear(24, 10, tp=tp, **CPU)
        assert load(column, a) == column.weight.numel() == 24 * 16 // size
        assert load(row, b) == row.weight.numel() == 10 * 24 // size
        assert torch.equal(column.weight, a[tp.rank * 24 // size :][: 24 // size])
        assert torch.equal(row.weight, b[:, tp.rank * 24 // size :][:, : 24 // size])
        plain = row(column(x))
        column.finish_loading()
        row.finish_loading()
        torch.testing.assert_close(row(column(x)), plain)
        return plain

    results = run_ranks(size, program)
    torch.testing.assert_close(results[0], x @ a.T @ b.T)
    assert all(torch.equal(result, results[0]) for result in results), "ranks differ"


@SIZES
def test_qkv_holds_this_ranks_heads(size):
    q, k, v = weight(8 * 4, 6, seed=1), weight(4 * 4, 6, seed=2), weight(4 * 4, 6, seed=3)
    x = weight(3, 6, seed=4)

    def program(tp):
        layer = QKVParallelLinear(6, num_heads=8, num_kv_heads=4, head_dim=4, tp=tp, **CPU)
        assert sum(load(layer, tensor, name) for name, tensor in (("v", v), ("q", q), ("k", k))) == layer.weight.numel()
        sizes = [32 // size, 16 // size, 16 // size]
        return layer(x).split(sizes, dim=-1)

    results = run_ranks(size, program)
    for i, tensor in enumerate((q, k, v)):
        torch.testing.assert_close(torch.cat([result[i] for result in results], dim=-1), x @ tensor.T)


def test_qkv_of_ranks_that_read_parts_of_key_value_heads():
    """12 query and 4 key/value heads on 3 ranks: rank 0 holds the key/value heads 0, 0, 0 and 1."""
    q, k, v = weight(12 * 2, 6, seed=1), weight(4 * 2, 6, seed=2), weight(4 * 2, 6, seed=3)

    def program(tp):
        layer = QKVParallelLinear(6, num_heads=12, num_kv_heads=4, head_dim=2, tp=tp, **CPU)
        assert (
            sum(layer.load_shard(layer.weight, Source(t), name) for name, t in (("v", v), ("q", q), ("k", k)))
            == layer.weight.numel()
        )
        return layer.weight.clone().split([8, 8, 8])

    held = [[0, 0, 0, 1], [1, 1, 2, 2], [2, 3, 3, 3]]
    for rank, (own_q, own_k, own_v) in enumerate(run_ranks(3, program)):
        assert torch.equal(own_q, q[rank * 8 : rank * 8 + 8])
        assert torch.equal(own_k.view(4, 2, 6), k.view(4, 2, 6)[held[rank]])
        assert torch.equal(own_v.view(4, 2, 6), v.view(4, 2, 6)[held[rank]])


def test_parts_of_different_sizes():
    a, b, x = weight(10, 16, seed=1), weight(7, 10, seed=2), weight(5, 16, seed=3)
    bounds = (0, 2, 6, 10)

    def program(tp):
        share = slice(bounds[tp.rank], bounds[tp.rank + 1])
        column = MergedColumnParallelLinear(16, [(None, 10)], tp=tp, rows={None: [share]}, **CPU)
        row = RowParallelLinear(10, 7, tp=tp, columns=share, **CPU)
        assert load(column, a) == column.weight.numel() and load(row, b) == row.weight.numel()
        assert torch.equal(column.weight, a[share]) and torch.equal(row.weight, b[:, share])
        return row(column(x))

    torch.testing.assert_close(run_ranks(3, program)[0], x @ a.T @ b.T)


def test_merged_columns_worked_example():
    """The docstring's numbers: rank 1 of 2 holds rows 3-5 of gate, then rows 3-5 of up."""
    gate, up = torch.arange(6.0).unsqueeze(1), torch.arange(10.0, 16.0).unsqueeze(1)

    def program(tp):
        layer = MergedColumnParallelLinear(1, [("gate", 6), ("up", 6)], tp=tp, **CPU)
        load(layer, up, "up")
        load(layer, gate, "gate")
        return layer.weight.flatten().tolist()

    assert run_ranks(2, program) == [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]


@SIZES
@pytest.mark.parametrize("vocab_size", [10, 12, 5])
def test_vocabulary_is_padded_divided_and_cut(size, vocab_size):
    table, x = weight(vocab_size, 6, seed=1), weight(3, 6, seed=2)
    token_ids = torch.arange(vocab_size)

    def program(tp):
        embed = VocabParallelEmbedding(vocab_size, 6, tp=tp, **CPU)
        head = ParallelLMHead(vocab_size, 6, tp=tp, **CPU)
        tied = ParallelLMHead(vocab_size, 6, tp=tp, **CPU, tied=embed)
        for layer in (embed, head):
            layer.weight.fill_(torch.nan)
            assert load(layer, table) == layer.weight.numel()
        head.finish_loading()
        tied.finish_loading()
        logits = head(x)
        assert (logits is None) == (tp.rank != 0)
        return embed(token_ids), logits, tied(x), head(x[:0])

    results = run_ranks(size, program)
    for embedded, *_ in results:
        assert torch.equal(embedded, embedding(token_ids, table))
    _, logits, tied_logits, empty = results[0]
    torch.testing.assert_close(logits, x @ table.T)
    torch.testing.assert_close(tied_logits, x @ table.T)
    assert empty.shape == (0, vocab_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_converts_the_dtype(dtype):
    layer = ColumnParallelLinear(4, 6, tp=SingleRank(), dtype=dtype, device="cpu")
    load(layer, weight(6, 4))
    assert torch.equal(layer.weight, weight(6, 4).to(dtype))
    loaded = layer.weight
    layer.finish_loading()
    assert layer.weight is loaded, "only fp32 gets another layout"
    x = weight(2, 4, seed=1).to(dtype)
    torch.testing.assert_close(layer(x), plain_linear(x, layer.weight))


@pytest.mark.parametrize(
    "make",
    [
        lambda tp: ColumnParallelLinear(4, 6, tp=tp, **CPU),
        lambda tp: RowParallelLinear(4, 6, tp=tp, **CPU),
        lambda tp: VocabParallelEmbedding(6, 4, tp=tp, **CPU),
    ],
)
def test_a_source_of_the_wrong_shape_is_refused(make):
    layer = make(SingleRank())
    for shape in ((6, 5), (7, 4), (6,), (6, 4, 1)):
        with pytest.raises(CheckpointError, match=r"Tensor 'w' of file has shape .* asks for \[6, 4\]"):
            load(layer, torch.zeros(shape))


class HalvesMethod:
    """A weight form of its own, to show that layers know none: two parameters, `high` and `low`, whose sum is the matrix."""

    def create(self, layer, out_features, in_features, *, weight_loader, dtype, device):
        weight = new_weight((out_features, in_features), weight_loader, dtype=dtype, device=device)
        layer.register_parameter("weight", weight)
        layer.register_buffer("low", torch.empty_like(weight))

    def load(self, layer, values, rows):
        layer.weight[rows].copy_(values.round())
        layer.low[rows].copy_(values - values.round())
        return layer.weight[rows].numel()

    def finish(self, layer):
        low = getattr(layer, "low", None)  # a tied head was never filled by `load`
        layer.register_parameter("weight", torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False))
        layer.total = layer.weight if low is None else layer.weight + low

    def apply(self, layer, x, bias=None):
        return plain_linear(x, layer.total, bias)


@SIZES
def test_a_layer_takes_its_weights_form_from_the_method(size):
    a, b, table, x = weight(24, 16, seed=1), weight(10, 24, seed=2), weight(10, 10, seed=3), weight(5, 16, seed=4)

    def program(tp):
        form = {"tp": tp, "method": HalvesMethod(), **CPU}
        layers = [
            ColumnParallelLinear(16, 24, **form),
            RowParallelLinear(24, 10, **form),
            ParallelLMHead(10, 10, **form),
        ]
        for layer, tensor in zip(layers, (a, b, table), strict=True):
            assert isinstance(layer, FinishesLoading)
            assert load(layer, tensor) == layer.weight.numel()
            layer.finish_loading()
        embed = VocabParallelEmbedding(10, 10, tp=tp, **CPU)
        load(embed, table)
        tied = ParallelLMHead(10, 10, tied=embed, **form)
        tied.finish_loading()
        assert tied.weight is not embed.weight, "the head has its own form, the embedding keeps its table"
        hidden_states = layers[1](layers[0](x))
        return layers[2](hidden_states), tied(hidden_states)

    for logits in run_ranks(size, program)[0]:
        torch.testing.assert_close(logits, x @ a.T @ b.T @ table.T, rtol=1e-4, atol=1e-4)
