"""Which form the weights take on which device."""

import pytest
import torch
from support.native import native_library

from workers.errors import ConfigError
from workers.quant.dense import DENSE, DenseMethod
from workers.quant.grouped import GroupedMethod
from workers.quant.select import select_method

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_deterministic_product_needs_a_gpu_that_runs_triton():
    assert select_method(CUDA) is DENSE
    with pytest.raises(
        ConfigError, match=r"--deterministic cannot work: its products run in Triton, and .*\. Leave it out\."
    ):
        select_method(CUDA, deterministic=True)


@pytest.mark.parametrize(("quantization", "num_bits"), [("int8", 8), ("int4", 4)])
def test_quantised_weights(quantization, num_bits):
    method = select_method(CPU, quantization=quantization)
    assert isinstance(method, GroupedMethod) and method.num_bits == num_bits and method.library is None


def test_the_cpu_uses_the_compiled_kernels_where_there_are_any():
    library = native_library("avx2")
    dense = select_method(CPU, library=library, deterministic=True)
    assert isinstance(dense, DenseMethod) and dense.library is library
    assert select_method(CPU, quantization="int8", library=library).library is library
