"""Compiles every Triton kernel for each kind of GPU, at the shapes of a 7B model, and shows what it needs. Runs without a GPU.

    python benchmarks/triton_resources.py [--output benchmarks/results/triton_resources.md]

An entry of LAUNCHES calls a kernel as the engine does, on CPU tensors; see workers/kernels/offline.py.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton

from workers.engine.kernel_cache import (
    BLOCK_SIZE,
    DTYPE,
    EPS,
    HEAD_DIM,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    empty,
    launch_attention,
    launch_lora,
    launch_rotary_kv,
    launch_sampling,
)
from workers.kernels.grouped.dequantize import dequantize
from workers.kernels.grouped.grouped_matmul import grouped_matmul
from workers.kernels.grouped.packed import NumBits, PackedWeight, pack
from workers.kernels.grouped.quantize_rows import quantize_rows
from workers.kernels.layers.add_rms_norm import add_rms_norm
from workers.kernels.layers.matmul import matmul
from workers.kernels.layers.silu_mul import silu_mul
from workers.kernels.offline import MAX_SHARED_BYTES, CompiledKernel, compile_for

CAPABILITIES = {80: "A100", 86: "A10G", 89: "L4", 90: "H100, H200"}
MAX_WARPS = {80: 64, 86: 48, 89: 48, 90: 64}  # of one multiprocessor
VOCAB_SIZE = 32_768
# What tells the variants of a kernel apart in the table.
SHOWN_CONSTANTS = {
    "BLOCK_M": "rows",
    "ROWS": "rows",
    "OUTPUTS": "outputs",
    "IS_SPLIT": "split",
    "WINDOW": "window",
    "HAS_ROWS": "of some rows",
}


# One entry for each way to launch: what it is, and a call that launches it.
LAUNCHES: dict[str, Callable[[], object]] = {
    "attention, decode": lambda: launch_attention([1] * 64, seq_len=4096),
    "attention, decode, window 4,096": lambda: launch_attention([1] * 64, seq_len=4096, sliding_window=4096),
    "attention, decode, one segment": lambda: launch_attention([1] * 64, seq_len=512),
    "attention, prefill": lambda: launch_attention([512], seq_len=512),
    "attention, prefill, window 4,096": lambda: launch_attention([4096], seq_len=4096, sliding_window=4096),
    "attention, short chunk": lambda: launch_attention([32], seq_len=4096),
    "norm": lambda: add_rms_norm(empty(64, HIDDEN_SIZE), None, weight=empty(HIDDEN_SIZE), eps=EPS),
    "residual add and norm": lambda: add_rms_norm(
        empty(64, HIDDEN_SIZE), empty(64, HIDDEN_SIZE), weight=empty(HIDDEN_SIZE), eps=EPS
    ),
    "rotary embedding and KV write": launch_rotary_kv,
    "SiLU(gate) x up": lambda: silu_mul(empty(64, 2 * INTERMEDIATE_SIZE)),
    "deterministic product, down": lambda: matmul(empty(64, INTERMEDIATE_SIZE), empty(HIDDEN_SIZE, INTERMEDIATE_SIZE)),
    "deterministic product, gate_up": lambda: matmul(empty(64, HIDDEN_SIZE), empty(2 * INTERMEDIATE_SIZE, HIDDEN_SIZE)),
    "sampling": lambda: launch_sampling(VOCAB_SIZE),
    "int4 product, decode, o": lambda: launch_product(8, HIDDEN_SIZE, num_bits=4),
    "int4 product, decode, gate_up": lambda: launch_product(8, 2 * INTERMEDIATE_SIZE, num_bits=4),
    "int4 product, 64 rows, o": lambda: launch_product(64, HIDDEN_SIZE, num_bits=4),
    "int4 product, 64 rows, gate_up": lambda: launch_product(64, 2 * INTERMEDIATE_SIZE, num_bits=4),
    "int4 product, wide scales and minima, decode": lambda: launch_product(
        8, HIDDEN_SIZE, num_bits=4, has_minima=True, scale_dtype=torch.float32
    ),
    "int4 product, wide scales and minima, 64 rows": lambda: launch_product(
        64, HIDDEN_SIZE, num_bits=4, has_minima=True, scale_dtype=torch.float32
    ),
    "int8 product, decode": lambda: launch_product(8, HIDDEN_SIZE, num_bits=8),
    "float8 product without the GPU's own, decode": lambda: grouped_matmul(
        empty(8, HIDDEN_SIZE), float8_weight(HIDDEN_SIZE, HIDDEN_SIZE)
    ),
    "int4 in 16 bits": lambda: dequantize(weight(HIDDEN_SIZE, num_bits=4), empty(HIDDEN_SIZE, HIDDEN_SIZE)),
    "adapters, decode, qkv": lambda: launch_lora(64, HIDDEN_SIZE, [HIDDEN_SIZE, 1024, 1024], num_slots=8),
    "adapters, prefill, gate_up": lambda: launch_lora(1024, HIDDEN_SIZE, [INTERMEDIATE_SIZE] * 2, num_slots=8),
    "adapters, decode, down": lambda: launch_lora(64, INTERMEDIATE_SIZE, [HIDDEN_SIZE], num_slots=8),
    "inputs in float8": lambda: quantize_rows(empty(64, INTERMEDIATE_SIZE)),
}


def launch_product(num_rows: int, out_features: int, **form: Any) -> None:
    grouped_matmul(empty(num_rows, HIDDEN_SIZE), weight(out_features, **form))


def weight(
    out_features: int, *, num_bits: NumBits, has_minima: bool = False, scale_dtype: torch.dtype = torch.float16
) -> PackedWeight:
    """In groups of 32."""
    values = torch.zeros((out_features, HIDDEN_SIZE), dtype=torch.int8)
    scales = torch.zeros((out_features, HIDDEN_SIZE // 32), dtype=scale_dtype)
    return pack(values, scales, scales if has_minima else None, num_bits=num_bits)


def float8_weight(out_features: int, in_features: int) -> PackedWeight:
    values = torch.zeros((out_features, in_features), dtype=torch.float8_e4m3fn)
    return pack(values, torch.ones((out_features, 1)), num_bits=8)


def compiled(capability: int) -> Iterator[tuple[str, CompiledKernel]]:
    for name, launch in LAUNCHES.items():
        for kernel in compile_for(capability, launch):
            yield name, kernel


def page() -> Iterator[str]:
    yield "# What the Triton kernels need"
    yield ""
    yield (
        f"Compiled without a GPU by `benchmarks/triton_resources.py`, Triton {triton.__version__}, at the shapes of a 7B model: "
        f"{NUM_HEADS} heads, {NUM_KV_HEADS} KV heads of {HEAD_DIM}, blocks of {BLOCK_SIZE} tokens, {str(DTYPE).removeprefix('torch.')}."
    )
    yield "Registers are per thread, 255 at most; spilled bytes are those that did not fit. Shared memory is per program. Programs: how"
    yield "many one multiprocessor can hold at once, by registers, shared memory and warps."
    for capability, gpus in CAPABILITIES.items():
        yield ""
        yield f"## Compute capability {capability / 10} ({gpus})"
        yield ""
        yield "| launch | kernel | variant | warps | registers | spilled bytes | shared memory | programs |"
        yield "|---|---|---|---|---|---|---|---|"
        for launch, kernel in compiled(capability):
            counts = (kernel.num_warps, kernel.num_registers, kernel.num_spilled_bytes)
            shared = f"{kernel.num_shared_bytes / 1024:.1f} KiB"
            cells = (launch, kernel.name, variant(kernel), *counts, shared, programs_at_once(kernel, capability))
            yield f"| {' | '.join(map(str, cells))} |"


def variant(kernel: CompiledKernel) -> str:
    shown = ((label, kernel.constants.get(name)) for name, label in SHOWN_CONSTANTS.items())
    return ", ".join(label if value is True else f"{value} {label}" for label, value in shown if value)


def programs_at_once(kernel: CompiledKernel, capability: int) -> int:
    """A multiprocessor has 65,536 registers, given to warps in units of 256, and 1 KiB more shared memory than the largest program may use,
    of which each program takes 1 KiB for itself.
    """
    per_warp = -(-kernel.num_registers * 32 // 256) * 256
    by_registers = 65_536 // (per_warp * kernel.num_warps)
    by_shared = (MAX_SHARED_BYTES[capability] + 1024) // (kernel.num_shared_bytes + 1024)
    return min(by_registers, by_shared, MAX_WARPS[capability] // kernel.num_warps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = "\n".join(page()) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
