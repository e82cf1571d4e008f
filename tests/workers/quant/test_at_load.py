"""Weights that are quantised while they are loaded: the same numbers as on a CPU, shard by shard, and a tied head stays as it is."""

from types import SimpleNamespace

import pytest
import torch
from support import triton_interpreter
from support.packed_weights import randn

from workers.kernels.grouped import specification
from workers.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from workers.quant.at_load import ROUNDS, AtLoadMethod, round_to_float8, round_to_groups
from workers.quant.dense import DENSE
from workers.quant.grouped import quantize_weight
from workers.quant.pack_cuda import Float8Matrix, cuda_pack

triton_interpreter.install()

CPU = torch.device("cpu")


def new_method(quantization):
    return AtLoadMethod(quantization, cuda_pack(DENSE, capability=(9, 0)), device=CPU, tied=DENSE)


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.01), ("int4", 0.12), ("fp8", 0.05)])
def test_shards_fill_a_layer_whose_product_is_near(quantization, error):
    method, layer, w, x = new_method(quantization), torch.nn.Module(), randn(48, 128), randn(3, 128, seed=1).bfloat16()
    method.create(layer, 48, 128, weight_loader=lambda *_: 0, dtype=torch.bfloat16, device=CPU)
    assert layer.weight.is_meta, "no memory before there are weights"
    assert method.load(layer, w[32:].half(), slice(32, 48)) + method.load(layer, w[:32], slice(0, 32)) == 48 * 128
    method.finish(layer)
    exact, product = x.float() @ w.T, method.apply(layer, x, torch.ones(48).bfloat16())
    assert product.dtype == torch.bfloat16
    assert (product.float() - 1 - exact).norm() < error * exact.norm()
    bytes_each = sum(p.nbytes for p in layer.parameters()) / w.numel()
    assert bytes_each == {"int8": 34 / 32, "int4": 18 / 32, "fp8": 1 + 4 / 128}[quantization]


def test_many_rows_are_rounded_in_parts(monkeypatch):
    weight = randn(10, 64)
    whole = quantize_weight(weight, num_bits=4), round_to_float8(weight)
    monkeypatch.setattr("workers.quant.at_load.ROUNDED_AT_ONCE", 3 * 64)
    parts = round_to_groups(weight, num_bits=4)
    assert torch.equal(parts.values, whole[0][0]) and torch.equal(parts.scales, whole[0][1])
    assert torch.equal(round_to_float8(weight).dequantize(), whole[1].dequantize())


def test_rows_of_float8_use_the_whole_range():
    weight = randn(3, 64) * torch.tensor([1e-4, 1.0, 1e4])[:, None]
    weight[1] = 0
    rounded = round_to_float8(weight)
    assert rounded.values.float().abs().amax(dim=1).tolist() == [448.0, 0.0, 448.0]
    assert (rounded.dequantize() - weight).abs().amax() <= weight.abs().amax() / 16
    torch.testing.assert_close(rounded.dequantize(), weight, rtol=2**-4, atol=1e-2)


def test_a_tied_head_keeps_the_form_of_the_embedding():
    method, head, x = new_method("int4"), torch.nn.Module(), randn(3, 48, seed=1)
    head.weight = torch.nn.Parameter(randn(20, 48), requires_grad=False)
    expected = x @ head.weight.T
    method.finish(head)
    torch.testing.assert_close(method.apply(head, x), expected)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_ranks_have_the_parts_of_the_whole_matrix(quantization):
    """Of 2 ranks: gate and up are divided by rows, down by inputs, at the borders of groups; fp8 has a scale for each row of a part."""
    gate, up, down = randn(64, 96), randn(64, 96, seed=1), randn(32, 64, seed=2)
    settings = {"dtype": torch.bfloat16, "device": CPU}

    def load(layer, *tensors):
        for shard_id, tensor in tensors:
            layer.weight.weight_loader(layer.weight, Source(tensor), shard_id)
        (matrix,) = layer.parts.matrices
        return dense_of(matrix)

    for rank in range(2):
        tp = SimpleNamespace(rank=rank, size=2)
        sizes = [("gate", 64), ("up", 64)]
        column = MergedColumnParallelLinear(96, sizes, tp=tp, method=new_method(quantization), **settings)
        row = RowParallelLinear(64, 32, tp=tp, method=new_method(quantization), **settings)
        rows, inputs = slice(32 * rank, 32 * rank + 32), slice(32 * rank, 32 * rank + 32)
        expected = torch.cat([ROUNDS[quantization](whole[rows]).dequantize() for whole in (gate, up)])
        assert torch.equal(load(column, ("gate", gate), ("up", up)), expected)
        assert torch.equal(load(row, (None, down)), ROUNDS[quantization](down[:, inputs]).dequantize())


class Source:
    def __init__(self, tensor):
        self.name, self.shape, self.tensor = "w", tuple(tensor.shape), tensor

    def __getitem__(self, index):
        return self.tensor[index]


def dense_of(matrix):
    if isinstance(matrix, Float8Matrix):
        return matrix.values.float() * matrix.scales.T
    weight = torch.empty(matrix.weight.out_features, matrix.weight.in_features)
    specification.dequantize(matrix.weight, weight)
    return weight
