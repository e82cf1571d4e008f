"""Whole numbers and scales taken out of ggml's blocks: bit for bit the floats that the `gguf` package makes of them."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from support.checkpoints.gguf_files import QUANTIZABLE, RANDOM_BLOCKS, encode

from workers.checkpoint.gguf.gguf_types import EXPANDED_TYPES, FLOAT_TYPES, GROUPED_TYPES, is_supported
from workers.quant.quantized import QuantizedTensor
from workers.weights.gguf.blocks import UNPACK
from workers.weights.gguf.types import form_of


def unpacked(dtype, data):
    _, block_bytes = gguf.constants.GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    values, scales, minima = UNPACK[dtype](torch.from_numpy(data).view(len(data), -1, block_bytes))
    minima = None if minima is None else minima.flatten(1)
    return QuantizedTensor(values.flatten(1), scales.flatten(1), minima, GROUPED_TYPES[dtype].num_bits)


@pytest.mark.parametrize("dtype", GROUPED_TYPES)
def test_the_numbers_are_those_of_the_package(dtype):
    rng = np.random.default_rng(1)
    data = encode(rng.standard_normal((9, 1024), dtype=np.float32), dtype, rng=rng)
    tensor = unpacked(dtype, data)
    expected = gguf.dequantize(data, GGMLQuantizationType[dtype])
    assert np.array_equal(tensor.dequantize().numpy(), expected)


@pytest.mark.parametrize("dtype", GROUPED_TYPES)
def test_the_form_says_what_the_numbers_are(dtype):
    rng = np.random.default_rng(2)
    tensor = unpacked(dtype, encode(rng.standard_normal((4, 512), dtype=np.float32), dtype, rng=rng))
    form = form_of(dtype)
    assert form is not None and form.group_size == max(tensor.group_size, 32)
    assert form.has_minima == (tensor.minima is not None)
    assert form.wide == (tensor.scales.dtype == torch.float32)
    lowest, highest = (-128, 127) if form.num_bits == 8 else (0, 15) if form.has_minima else (-8, 7)
    assert lowest <= int(tensor.values.min()) and int(tensor.values.max()) <= highest


def test_a_worked_example_of_4_bits_with_minima():
    """Scale 0.5, minimum -1, the numbers 1 to 4 in two bytes: inputs 0 and 1 in the low halves, 16 and 17 in the high ones."""
    block = np.zeros((1, 20), dtype=np.uint8)
    block[0, :4] = np.array([0.5, -1.0], dtype=np.float16).view(np.uint8)
    block[0, 4:6] = 1 | 3 << 4, 2 | 4 << 4
    tensor = unpacked("Q4_1", block)
    assert tensor.values[0, [0, 1, 16, 17]].tolist() == [1, 2, 3, 4]
    assert tensor.dequantize()[0, [0, 1, 2, 16, 17]].tolist() == [-0.5, 0.0, -1.0, 0.5, 1.0]


def test_the_extreme_scales_of_mxfp4():
    """A power of two for each byte; the two smallest are subnormal numbers."""
    blocks = np.zeros((256, 17), dtype=np.uint8)
    blocks[:, 0], blocks[:, 1] = np.arange(256), 1
    blocks = blocks[:-1]  # the last one stands for no number
    assert unpacked("MXFP4", blocks).dequantize()[:, 0].tolist() == [2.0 ** (e - 128) for e in range(255)]


def test_every_type_of_a_model_is_known():
    """What the package can make, and what llama.cpp's files have besides."""
    assert all(is_supported(dtype) for dtype in (*QUANTIZABLE, *RANDOM_BLOCKS))
    others = {t.name for t in GGMLQuantizationType} - set(GROUPED_TYPES) - set(FLOAT_TYPES) - set(EXPANDED_TYPES)
    # Of intermediate results, of tables of whole numbers, and one that the package cannot read.
    assert others == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "Q1_0"}
