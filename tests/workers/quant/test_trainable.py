"""Frozen matrices of 8 or 4 bits: the very numbers that serve, and gradients as beside plain ones."""

import pytest
import torch

from workers.quant.at_load import round_to_groups
from workers.quant.trainable import QuantizedLinear, quantize_linears


@pytest.mark.parametrize("num_bits", [8, 4])
def test_a_quantized_matrix_is_the_one_that_serves(num_bits):
    linear = torch.nn.Linear(64, 48, bias=False)
    quantized = QuantizedLinear(linear, num_bits)
    expected = round_to_groups(linear.weight.detach(), num_bits=num_bits).dequantize()
    assert torch.equal(quantized.weight, expected)
    assert quantized.values.numel() == 64 * 48 * num_bits // 8
    x = torch.randn(5, 64, requires_grad=True)
    y = quantized(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, x @ expected.T)
    torch.testing.assert_close(x.grad, 2 * y @ expected)


def test_all_linear_layers_but_the_one_named():
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Sequential(torch.nn.Linear(64, 32)), torch.nn.ReLU())
    inner = model[1]
    quantize_linears(model, num_bits=8, but=model[0].weight)
    assert type(model[0]) is torch.nn.Linear and type(inner[0]) is QuantizedLinear and inner is model[1]
    assert torch.equal(model[1][0].bias, inner[0].bias)
