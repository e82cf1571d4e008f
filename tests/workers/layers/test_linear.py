"""Divided layers compute what whole layers compute, and each rank loads its own slices only."""

import pytest
import torch
from support.ranks.rank_threads import run_ranks
from torch.nn.functional import embedding
from torch.nn.functional import linear as plain_linear

from workers.errors import CheckpointError
from workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from workers.layers.linear import (
    CAN_PACK,
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    linear,
    pack,
)
from workers.parallel.group import SingleRank

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
        column.pack()
        row.pack()
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
        head.pack()
        tied.pack()
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
    assert pack(layer.weight) is layer.weight, "only fp32 is packed"
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
def test_misshapen_source_is_refused(make):
    layer = make(SingleRank())
    for shape in ((6, 5), (7, 4), (6,), (6, 4, 1)):
        with pytest.raises(CheckpointError, match=r"Tensor 'w' of file has shape .* asks for \[6, 4\]"):
            load(layer, torch.zeros(shape))


@pytest.mark.skipif(not CAN_PACK, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (48, 96), (512, 1024), (257, 2048)])
def test_packed_product_is_right_and_each_row_independent_of_the_batch(out_features, in_features):
    w, x = weight(out_features, in_features), weight(130, in_features, seed=1)
    packed = pack(torch.nn.Parameter(w, requires_grad=False))
    assert packed.is_mkldnn
    with torch.inference_mode():
        whole = linear(x, packed)
        torch.testing.assert_close(whole, plain_linear(x, w), rtol=1e-4, atol=1e-3)
        for num_rows in (0, 1, 2, 3, 4, 7, 8, 16, 33, 129):
            assert torch.equal(linear(x[:num_rows], packed), whole[:num_rows]), f"{num_rows} rows"
            assert torch.equal(linear(x[130 - num_rows :], packed), whole[130 - num_rows :]), f"last {num_rows} rows"
