"""LoRA's product: each implementation against the specification; a row's bits alone, among others, in another slot and in chunks."""

import numpy as np
import pytest
import torch
from support import triton_interpreter
from support.native import native_library

from workers.kernels.lora.host_memory import HostMemory
from workers.kernels.lora.native_table import NativeLoraTable
from workers.kernels.lora.rows import AdapterRows, group_rows
from workers.kernels.lora.table import LoraMatrices, NumbersError, TorchLoraTable
from workers.native.variants import VARIANTS

triton_interpreter.install()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
KINDS = pytest.mark.parametrize("kind", [*(variant.name for variant in VARIANTS), "triton"])
# In, out of each shard, ranks of the adapters: odd sizes, one input of 16 too many, more ranks and outputs than one panel has.
SHAPES = [(37, [5], [1, 3]), (96, [64, 32, 32], [4, 16, 17]), (80, [130, 70], [33, 8])]


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_table(kind, in_features, out_sizes, *, num_slots, dtype, max_rank=40):
    if kind == "torch":
        return TorchLoraTable(in_features, out_sizes, num_slots=num_slots, dtype=dtype, device=torch.device("cpu"))
    if kind == "triton":
        from workers.kernels.lora.triton_table import TritonLoraTable

        return TritonLoraTable(
            in_features, out_sizes, num_slots=num_slots, max_rank=max_rank, dtype=dtype, device=torch.device("cpu")
        )
    return NativeLoraTable(in_features, out_sizes, num_slots=num_slots, dtype=dtype, library=native_library(kind))


def make_parts(in_features, out_sizes, ranks, dtype):
    """For each adapter its matrices. Every third shard is left alone."""
    adapters = []
    for i, rank in enumerate(ranks):
        parts = []
        for shard, n in enumerate(out_sizes):
            a, b = randn(rank, in_features, seed=10 * i + shard), randn(n, rank, seed=100 + 10 * i + shard)
            left_alone = len(out_sizes) > 1 and (i + shard) % 3 == 2
            parts.append(None if left_alone else LoraMatrices(a.to(dtype), b.to(dtype), 0.5 + i))
        adapters.append(parts)
    return adapters


def put_all(table, adapters, slots):
    for adapter, slot in zip(adapters, slots, strict=True):
        table.put(slot, table.prepare(adapter, HostMemory()))


def rows_of(slots, num_slots):
    order, starts = group_rows(np.array(slots, dtype=np.int32), num_slots)
    return AdapterRows(torch.from_numpy(order), torch.from_numpy(starts))


def test_the_worked_example():
    order, starts = group_rows(np.array([2, -1, 0, 2], dtype=np.int32), 3)
    assert (order.tolist(), starts.tolist()) == ([2, 0, 3, 0], [0, 1, 1, 3])
    order, starts = group_rows(np.full(2, -1, dtype=np.int32), 3)
    assert (order.tolist(), starts.tolist()) == ([0, 0], [0, 0, 0, 0])


@KINDS
@DTYPES
@pytest.mark.parametrize(("in_features", "out_sizes", "ranks"), SHAPES, ids=str)
def test_equals_the_specification(kind, dtype, in_features, out_sizes, ranks):
    num_slots, num_rows = len(ranks) + 1, 29
    adapters = make_parts(in_features, out_sizes, ranks, dtype)
    # Rows further apart than they are long.
    x = randn(num_rows, in_features + 3, seed=1).to(dtype)[:, :in_features]
    base = randn(num_rows, sum(out_sizes), seed=2).to(dtype)
    slots = [i % (num_slots + 1) - 1 for i in range(num_rows)]
    found, expected = base.clone(), base.clone()
    for name, out in ((kind, found), ("torch", expected)):
        table = make_table(name, in_features, out_sizes, num_slots=num_slots, dtype=dtype)
        put_all(table, adapters, range(len(ranks)))
        table.add(out, x, rows_of(slots, num_slots))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    for row, slot in enumerate(slots):
        # The last slot is empty.
        assert torch.equal(found[row], base[row]) == (slot in (-1, num_slots - 1))


@KINDS
@DTYPES
def test_a_row_has_the_same_bits_in_any_company_slot_and_chunk(kind, dtype):
    in_features, out_sizes, ranks = 200, [70, 40], [4, 20, 16]
    adapters = make_parts(in_features, out_sizes, ranks, dtype)
    x, base = randn(40, in_features, seed=1).to(dtype), randn(40, sum(out_sizes), seed=2).to(dtype)
    which = [i % 4 - 1 for i in range(20)] + [1] * 20
    table = make_table(kind, in_features, out_sizes, num_slots=3, dtype=dtype)
    put_all(table, adapters, range(3))
    whole = base.clone()
    table.add(whole, x, rows_of(which, 3))
    elsewhere = make_table(kind, in_features, out_sizes, num_slots=5, dtype=dtype)
    put_all(elsewhere, adapters, (4, 0, 3))
    moved = [-1 if slot < 0 else (4, 0, 3)[slot] for slot in which]
    for start, stop in [(0, 1), (1, 2), (2, 3), (19, 40), (5, 12), (25, 39), (0, 40)]:
        out = base[start:stop].clone()
        elsewhere.add(out, x[start:stop], rows_of(moved[start:stop], 5))
        assert torch.equal(out, whole[start:stop]), f"rows {start} to {stop}"


@DTYPES
def test_all_numbers_of_threads_give_the_same_bits_and_in_float32_all_instruction_sets(dtype):
    """Enough work for several threads."""
    in_features, out_sizes = 600, [640, 320]
    adapters = make_parts(in_features, out_sizes, [24, 8], dtype)
    x, base = randn(60, in_features, seed=1).to(dtype), randn(60, sum(out_sizes), seed=2).to(dtype)
    found = {}
    for variant in VARIANTS:
        try:
            table = make_table(variant.name, in_features, out_sizes, num_slots=2, dtype=dtype)
        except pytest.skip.Exception:
            continue
        put_all(table, adapters, range(2))
        for num_threads in (1, 3):
            num_before = torch.get_num_threads()
            torch.set_num_threads(num_threads)
            out = base.clone()
            table.add(out, x, rows_of([i % 3 - 1 for i in range(60)], 2))
            torch.set_num_threads(num_before)
            # Only AVX-512 has an instruction for pairs of bfloat16.
            group = "float32" if dtype is torch.float32 else variant.name == "avx2"
            assert torch.equal(found.setdefault(group, out), out), variant.name
    if not found:
        pytest.skip("no compiled kernels here")


@KINDS
@DTYPES
def test_numbers_of_a_file_are_rounded_once_as_torch_does_it(kind, dtype):
    """Whatever their type, and wherever the rows lie: here in a larger matrix, of which a rank has some columns."""
    in_features, out_sizes, rank = 301, [70], 19
    a, b = randn(rank, in_features + 9, seed=1).double(), randn(70, rank + 4, seed=2).double()
    x = randn(3, in_features, seed=3).to(dtype)
    for stored in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        inside = LoraMatrices(a.to(stored)[:, 4 : in_features + 4], b.to(stored)[:, 2 : rank + 2], 0.5)
        apart = LoraMatrices(inside.a.to(dtype).contiguous(), inside.b.to(dtype).contiguous(), 0.5)
        table = make_table(kind, in_features, out_sizes, num_slots=2, dtype=dtype)
        put_all(table, [[inside], [apart]], range(2))
        found, expected = torch.zeros(2, 3, 70, dtype=dtype)
        table.add(found, x, rows_of([0, 0, 0], 2))
        table.add(expected, x, rows_of([1, 1, 1], 2))
        assert expected.any() and torch.equal(found, expected), stored


@KINDS
@pytest.mark.parametrize("half", ["A", "B"])
def test_numbers_that_cannot_be_used_are_named(kind, half):
    for value, stored, dtype, message in (
        (float("nan"), torch.bfloat16, torch.bfloat16, "infinite numbers or NaN"),
        (float("-inf"), torch.float16, torch.float32, "infinite numbers or NaN"),
        (3.4e38, torch.float32, torch.bfloat16, "numbers too large for bfloat16"),
        (-1e39, torch.float64, torch.float32, "numbers too large for float32"),
    ):
        parts = [LoraMatrices(randn(5, 40, seed=i).to(stored), randn(66, 5, seed=i).to(stored), 1.0) for i in (0, 1)]
        (parts[1].a if half == "A" else parts[1].b)[-1, -1] = value
        table = make_table(kind, 40, [66, 66], num_slots=1, dtype=dtype)
        with pytest.raises(NumbersError, match=message) as found:
            table.prepare(parts, HostMemory())
        assert (found.value.shard, found.value.half) == (1, half)


@KINDS
def test_an_emptied_slot_adds_nothing(kind):
    adapters = make_parts(32, [16], [4], torch.float32)
    table = make_table(kind, 32, [16], num_slots=1, dtype=torch.float32)
    put_all(table, adapters, [0])
    x, out = randn(3, 32, seed=1), torch.zeros(3, 16)
    table.put(0, None)
    table.add(out, x, rows_of([0, 0, 0], 1))
    assert not out.any()
    put_all(table, adapters, [0])
    table.add(out, x, rows_of([0, -1, 0], 1))
    assert out[0].any() and not out[1].any()
