"""Quantised checkpoints of every format: each matrix, and each part of one, is what the format's rules say."""

import pytest
import torch
from support.checkpoints.quantized.checkpoints import KINDS, write_quantized

from workers.checkpoint.model_config import load_model_config
from workers.quant.quantized import Float8Tensor, QuantizedTensor, dense_values
from workers.weights.loader import open_sources

LAYER = "model.layers.0"


@pytest.fixture(scope="module", params=KINDS)
def folders(request, tmp_path_factory):
    return write_quantized(tmp_path_factory.mktemp("checkpoint"), request.param, num_hidden_layers=1)


def assert_equal(values, expected):
    torch.testing.assert_close(dense_values(values), expected, rtol=3e-7, atol=1e-9)


def test_every_part_means_what_the_dense_checkpoint_has(folders):
    quantized, meant = folders
    with (
        open_sources(quantized, load_model_config(quantized)) as sources,
        open_sources(meant, load_model_config(meant)) as dense,
    ):
        assert sources.keys() == dense.keys()
        for name, source in sources.items():
            whole = dense[name][:]
            assert source.shape == dense[name].shape
            assert_equal(source[:], whole)
            if "_proj" not in name:
                assert torch.equal(source[:], whole)
                continue
            assert isinstance(source[:], QuantizedTensor | Float8Tensor)
            assert_equal(source[8:24], whole[8:24])
            assert_equal(source[3:21], whole[3:21])
            assert_equal(source[5:9, 32:64], whole[5:9, 32:64])
            half = whole.shape[1] // 2
            assert_equal(source[:, half:], whole[:, half:])
            assert_equal(source[:, :half], whole[:, :half])
