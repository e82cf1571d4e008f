"""What stored weights become on a GPU, here on the CPU in Triton's interpreter: near the exact product, whichever product computes."""

import pytest
import torch
from support import triton_interpreter
from support.checkpoints.quantized.checkpoints import KINDS, write_quantized
from support.packed_weights import FORMS, Form, randn, stored

from workers.checkpoint.model_config import load_model_config
from workers.quant.dense import DENSE
from workers.quant.pack_cuda import Float8Matrix, GroupedMatrix, cuda_pack
from workers.quant.quantized import Float8Tensor, QuantizedTensor
from workers.weights.loader import open_sources

triton_interpreter.install()

CPU = torch.device("cpu")
AMPERE, HOPPER = (8, 0), (9, 0)


def values_of(form: Form, out_features: int, in_features: int, *, seed: int = 0):
    values, scales, minima = stored(form, out_features, in_features, seed=seed)
    if form.is_float8:
        return Float8Tensor(values=values, scales=scales, block_size=form.group_size or in_features)
    return QuantizedTensor(values=values, scales=scales, minima=minima, num_bits=form.num_bits)


def assert_multiplies(matrix, x, weight, *, tolerance):
    exact = x.float() @ weight.T
    product = matrix.multiply(x)
    assert product.dtype == x.dtype and product.shape == exact.shape
    assert (product.float() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_few_rows_and_many_are_near_the_exact_product(form):
    values = values_of(form, 48, 256)
    matrix = cuda_pack(DENSE, capability=AMPERE, max_fused_rows=4)(values, torch.bfloat16, CPU)
    assert isinstance(matrix, GroupedMatrix)
    for num_rows in (4, 5):
        assert_multiplies(matrix, randn(num_rows, 256).bfloat16(), values.dequantize(), tolerance=2**-8)


def test_many_rows_never_have_the_whole_matrix_in_16_bits(monkeypatch):
    monkeypatch.setattr("workers.quant.pack_cuda.WORKSPACE_BYTES", 20 * 64 * 2)
    values = values_of(Form(4, 32), 50, 64)  # slices of 20, 20 and 10 outputs
    matrix = cuda_pack(DENSE, capability=AMPERE, max_fused_rows=0)(values, torch.float16, CPU)
    assert_multiplies(matrix, randn(3, 64).half(), values.dequantize(), tolerance=2**-10)


def test_deterministic_rows_have_the_same_bits_however_many_there_are():
    values, x = values_of(Form(4, 32, has_minima=True), 40, 128), randn(20, 128).bfloat16()
    matrix = cuda_pack(DENSE, capability=HOPPER, deterministic=True, max_fused_rows=4)(values, torch.bfloat16, CPU)
    whole = matrix.multiply(x)
    assert torch.equal(torch.cat([matrix.multiply(row[None]) for row in x]), whole)


def test_columns_in_another_order():
    values = values_of(Form(4, 32), 16, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    values = QuantizedTensor(values=values.values, scales=values.scales, minima=None, num_bits=4, inputs=order)
    matrix = cuda_pack(DENSE, capability=AMPERE)(values, torch.float32, CPU)
    assert len(matrix.tensors) == 3
    assert_multiplies(matrix, randn(3, 64), values.dequantize(), tolerance=1e-6)


@pytest.mark.parametrize("group_size", [96, 192])
def test_groups_that_do_not_fit_a_block_are_divided(group_size):
    values = values_of(Form(4, group_size), 8, 384)
    matrix = cuda_pack(DENSE, capability=AMPERE)(values, torch.float32, CPU)
    assert isinstance(matrix, GroupedMatrix) and matrix.weight.group_size in (32, 64)
    assert_multiplies(matrix, randn(2, 384), values.dequantize(), tolerance=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        values_of(Form(8, 16), 8, 48),
        Float8Tensor(values=randn(8, 48).to(torch.float8_e4m3fn), scales=torch.ones(8, 2), block_size=32),
    ],
    ids=["groups of 16", "a block that is not whole"],
)
def test_what_no_kernel_reads_becomes_dense(values):
    matrix = cuda_pack(DENSE, capability=AMPERE)(values, torch.float32, CPU)
    assert not isinstance(matrix, GroupedMatrix) and [t.dtype for t in matrix.tensors] == [torch.float32]
    assert_multiplies(matrix, randn(2, 48), values.dequantize(), tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scales", [torch.tensor([[0.02]]), randn(32, 1, seed=5).abs() * 0.1], ids=["one", "of rows"])
def test_the_gpus_own_product_of_float8(scales, dtype):
    values = Float8Tensor(values=(randn(32, 64) * 50).to(torch.float8_e4m3fn), scales=scales, block_size=64)
    matrix = cuda_pack(DENSE, capability=(8, 9))(values, dtype, CPU)
    assert isinstance(matrix, Float8Matrix) and matrix.tensors[0].dtype == torch.float8_e4m3fn
    # The inputs have 3 bits of mantissa.
    assert_multiplies(matrix, randn(5, 64, seed=2).to(dtype), values.dequantize(), tolerance=0.04)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_static_scale_of_inputs(dtype):
    """All rows are divided by it, and what is too large becomes the largest number of the type."""
    scale, x = torch.tensor(0.01), randn(5, 64, seed=2).to(dtype)
    x[1] *= 1000
    values = Float8Tensor(
        values=(randn(32, 64) * 50).to(torch.float8_e4m3fn),
        scales=torch.tensor([[0.02]]),
        block_size=64,
        input_scale=scale,
    )
    matrix = cuda_pack(DENSE, capability=(8, 9))(values, dtype, CPU)
    rounded = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert not torch.allclose(rounded[1], x[1].float(), rtol=0.1)
    expected = (rounded @ values.dequantize().T).to(dtype)
    torch.testing.assert_close(matrix.multiply(x), expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    assert matrix.rounds_statically is True
    older = cuda_pack(DENSE, capability=AMPERE)(values, dtype, CPU)
    assert older.rounds_statically is False


@pytest.mark.parametrize(
    ("capability", "deterministic", "shape", "block_size"),
    [((8, 6), False, (32, 64), 64), ((9, 0), True, (32, 64), 64), ((9, 0), False, (33, 64), 64), ((9, 0), False, (32, 64), 32)],
    ids=["an older GPU", "deterministic", "33 outputs", "blocks"],
)  # fmt: skip
def test_float8_elsewhere_is_read_by_the_kernels(capability, deterministic, shape, block_size):
    scales = randn(shape[0], shape[1] // block_size).abs()
    values = Float8Tensor(values=randn(*shape).to(torch.float8_e4m3fn), scales=scales, block_size=block_size)
    matrix = cuda_pack(DENSE, capability=capability, deterministic=deterministic)(values, torch.bfloat16, CPU)
    assert isinstance(matrix, GroupedMatrix) and matrix.weight.is_float8
    assert_multiplies(matrix, randn(3, 64).bfloat16(), values.dequantize(), tolerance=2**-8)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_every_checkpoint_keep_their_bits(kind, tmp_path):
    """Those whose groups the kernels read; all of them are near what the checkpoint means."""
    folder, meant = write_quantized(tmp_path, kind, num_hidden_layers=1)
    pack = cuda_pack(DENSE, capability=AMPERE)
    with (
        open_sources(folder, load_model_config(folder)) as sources,
        open_sources(meant, load_model_config(meant)) as dense,
    ):
        for name in ("self_attn.k_proj", "mlp.down_proj"):
            values, weight = (source[f"model.layers.0.{name}.weight"][:] for source in (sources, dense))
            matrix = pack(values, torch.float32, CPU)
            assert_multiplies(matrix, randn(2, weight.shape[1]), weight, tolerance=1e-5)
            if isinstance(values, QuantizedTensor) and values.group_size % 32 == 0:
                assert isinstance(matrix, GroupedMatrix), f"{name} of {kind} became dense"
