"""Compiles the GPU kernels ahead of time, without a GPU, into Triton's cache (TRITON_CACHE_DIR):

    python -m workers.engine.kernel_cache [--capabilities 80 86 89 90] [--tensor-parallel-sizes 1 2 4 8] [--forms bfloat16 int4 ...]

Launches what the engine launches for a Mistral 7B in bfloat16, on CPU tensors, with weights as they are and in the usual forms of 4 and 8
bits, and with adapters. A server with the same files of Tramontane and Triton finds the results in the cache, and does not compile them
when it starts. Other models, other forms, what is missing here, and Triton's launcher, which is linked with the driver, are compiled when
they are needed.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

import torch
import triton

from workers.attention.backend import AttentionMetadata
from workers.attention.triton_paged import SEGMENT, TritonBackend
from workers.config import EngineConfig
from workers.kernels.grouped.dequantize import dequantize
from workers.kernels.grouped.grouped_matmul import grouped_matmul
from workers.kernels.grouped.packed import PackedWeight, pack
from workers.kernels.grouped.quantize_rows import quantize_rows
from workers.kernels.layers.add_rms_norm import add_rms_norm
from workers.kernels.layers.matmul import matmul
from workers.kernels.layers.rotary_kv import rotary_kv
from workers.kernels.layers.silu_mul import silu_mul
from workers.kernels.lora.rows import AdapterRows
from workers.kernels.lora.triton_table import TritonLoraTable
from workers.kernels.offline import MAX_SHARED_BYTES, compile_for
from workers.kernels.sampling import sample
from workers.kernels.sampling.logprobs import find_logprobs
from workers.kernels.sampling.sample_specification import SamplingTable
from workers.quant.forms import Float8Form, GroupedForm

# Of weights: as they are, what --quantization makes of them, and the usual GPTQ and AWQ checkpoints.
FORMS: dict[str, GroupedForm | Float8Form | None] = {
    "bfloat16": None,
    "int4": GroupedForm(num_bits=4, group_size=32),
    "int8": GroupedForm(num_bits=8, group_size=32),
    "fp8": Float8Form(block_size=(1, None)),
    "gptq": GroupedForm(num_bits=4, group_size=128),
    "awq": GroupedForm(num_bits=4, group_size=128, has_minima=True, wide=True),
}
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)  # of the 7B family, on one machine
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN_SIZE, INTERMEDIATE_SIZE = 4096, 14_336
VOCAB_SIZES = (32_000, 32_768)
SLIDING_WINDOWS = (None, 4096)
EPS = 1e-5
DTYPE = torch.bfloat16
BLOCK_SIZE = EngineConfig.block_size
NUM_TOKENS = 64


def compile_kernels(capability: int, tensor_parallel_size: int, form: str = "bfloat16") -> int:
    """Compiles what one rank launches. capability: 80 for compute capability 8.0. Returns the number of kernels."""
    return len(compile_for(capability, lambda: launch_form(form, tensor_parallel_size)))


def launch_form(form: str, tensor_parallel_size: int) -> None:
    """What a form of weights adds to "bfloat16", which is everything else."""
    stored = FORMS[form]
    if stored is None:
        launch_all(tensor_parallel_size)
    else:
        launch_quantized(stored, tensor_parallel_size)


def launch_all(tensor_parallel_size: int) -> None:
    """Each kernel in every form that a step of the engine needs. Shapes are those of one rank; values are not read."""
    heads, kv_heads = NUM_HEADS // tensor_parallel_size, NUM_KV_HEADS // tensor_parallel_size
    intermediate = INTERMEDIATE_SIZE // tensor_parallel_size
    x, weight = empty(NUM_TOKENS, HIDDEN_SIZE), empty(HIDDEN_SIZE)
    add_rms_norm(x, None, weight=weight, eps=EPS)
    add_rms_norm(x, empty(NUM_TOKENS, HIDDEN_SIZE), weight=weight, eps=EPS)
    launch_rotary_kv(heads, kv_heads)
    silu_mul(empty(NUM_TOKENS, 2 * intermediate))
    # Decode and prefill, each with contexts of one segment, which are not split, and of several.
    query_lens = ([1] * NUM_TOKENS, [4 * NUM_TOKENS])
    for window, lens, seq_len in product(SLIDING_WINDOWS, query_lens, (SEGMENT, 4 * SEGMENT)):
        launch_attention(lens, seq_len=seq_len, sliding_window=window, num_heads=heads, num_kv_heads=kv_heads)
    for vocab_size in VOCAB_SIZES:
        launch_sampling(vocab_size)
    for in_features, out_sizes in adapted_layers(tensor_parallel_size):
        launch_lora(NUM_TOKENS, in_features, out_sizes)
    # Of --deterministic: qkv, o, gate and up, down, and the head.
    for out_features, in_features in matrix_shapes(tensor_parallel_size):
        matmul(empty(NUM_TOKENS, in_features), empty(out_features, in_features))


def matrix_shapes(tensor_parallel_size: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of qkv, o, gate and up, down, and the heads, on one rank."""
    heads, kv_heads = NUM_HEADS // tensor_parallel_size, NUM_KV_HEADS // tensor_parallel_size
    intermediate = INTERMEDIATE_SIZE // tensor_parallel_size
    return [
        ((heads + 2 * kv_heads) * HEAD_DIM, HIDDEN_SIZE),
        (HIDDEN_SIZE, heads * HEAD_DIM),
        (2 * intermediate, HIDDEN_SIZE),
        (HIDDEN_SIZE, intermediate),
        *((-(-vocab_size // tensor_parallel_size), HIDDEN_SIZE) for vocab_size in VOCAB_SIZES),
    ]


def adapted_layers(tensor_parallel_size: int) -> list[tuple[int, list[int]]]:
    """(inputs, outputs of each matrix) of qkv, o, gate and up, and down, on one rank."""
    heads, kv_heads = NUM_HEADS // tensor_parallel_size, NUM_KV_HEADS // tensor_parallel_size
    intermediate = INTERMEDIATE_SIZE // tensor_parallel_size
    return [
        (HIDDEN_SIZE, [heads * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM]),
        (heads * HEAD_DIM, [HIDDEN_SIZE]),
        (HIDDEN_SIZE, [intermediate] * 2),
        (intermediate, [HIDDEN_SIZE]),
    ]


def launch_lora(num_rows: int, in_features: int, out_sizes: Sequence[int], *, num_slots: int = 1) -> None:
    """For the ranks of `serve` without --max-lora-rank."""
    table = TritonLoraTable(
        in_features,
        out_sizes,
        num_slots=num_slots,
        max_rank=EngineConfig.max_lora_rank,
        dtype=DTYPE,
        device=torch.device("cpu"),
    )
    order, starts = torch.zeros(num_rows, dtype=torch.int32), torch.zeros(num_slots + 1, dtype=torch.int32)
    table.add(empty(num_rows, sum(out_sizes)), empty(num_rows, in_features), AdapterRows(order, starts))


def launch_quantized(form: GroupedForm | Float8Form, tensor_parallel_size: int) -> None:
    """Products of few rows and of more, and what writes weights for the library's product of many."""
    for out_features, in_features in matrix_shapes(tensor_parallel_size):
        weight = packed_weight(form, out_features, in_features)
        for num_rows in (1, NUM_TOKENS):
            grouped_matmul(empty(num_rows, in_features), weight)
        if isinstance(form, Float8Form):
            # Of GPUs with a product of 8-bit floats, which have their inputs rounded.
            quantize_rows(empty(NUM_TOKENS, in_features))
        else:
            dequantize(weight, empty(out_features, in_features))


def packed_weight(form: GroupedForm | Float8Form, out_features: int, in_features: int) -> PackedWeight:
    """As `pack` makes it, with values that are not read."""
    if isinstance(form, Float8Form):
        row = pack(torch.zeros((1, in_features)).to(torch.float8_e4m3fn), torch.ones((1, 1)), num_bits=8)
    else:
        scales = torch.ones((1, in_features // form.group_size), dtype=torch.float32 if form.wide else torch.float16)
        values = torch.zeros((1, in_features), dtype=torch.int8)
        row = pack(values, scales, scales if form.has_minima else None, num_bits=form.num_bits)

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty((tensor.shape[0], out_features, *tensor.shape[2:]))

    minima = None if row.minima is None else rows(row.minima)
    return replace(row, words=rows(row.words), scales=rows(row.scales), minima=minima)


def launch_rotary_kv(num_heads: int = NUM_HEADS, num_kv_heads: int = NUM_KV_HEADS) -> None:
    cache = empty(2, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
    cos, sin = torch.empty((NUM_TOKENS, 2, HEAD_DIM)).split(1, dim=1)
    slot_mapping = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    qkv = empty(NUM_TOKENS, num_heads + 2 * num_kv_heads, HEAD_DIM)
    rotary_kv(qkv, (cos, sin), kv_cache=(cache, cache), slot_mapping=slot_mapping)


def launch_attention(
    query_lens: Sequence[int],
    *,
    seq_len: int,
    sliding_window: int | None = None,
    num_heads: int = NUM_HEADS,
    num_kv_heads: int = NUM_KV_HEADS,
) -> None:
    """query_lens: new tokens of each sequence; seq_len: tokens of each, the new ones included."""
    num_seqs = len(query_lens)
    backend = TritonBackend(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, sliding_window=sliding_window
    )
    metadata = AttentionMetadata(
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
        block_table=torch.zeros((num_seqs, seq_len // BLOCK_SIZE), dtype=torch.int32),
        seq_lens=torch.zeros(num_seqs, dtype=torch.int32),
        cu_seqlens_q=torch.zeros(num_seqs + 1, dtype=torch.int32),
        query_lens=list(query_lens),
        context_lens=[seq_len] * num_seqs,
        max_query_len=max(query_lens),
        max_seq_len=seq_len,
    )
    cache = empty(2, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
    backend.forward(empty(sum(query_lens), num_heads, HEAD_DIM), cache, cache, metadata)


def launch_sampling(vocab_size: int) -> None:
    logits = torch.empty((NUM_TOKENS, vocab_size))
    counts = torch.empty((NUM_TOKENS, vocab_size), dtype=torch.int32)
    table = SamplingTable(
        floats=torch.empty((4, NUM_TOKENS)),
        integers=torch.empty((6, NUM_TOKENS), dtype=torch.int64),
        masks=torch.empty((1, -(-vocab_size // 8)), dtype=torch.uint8),
        penalizes=True,
        draws=True,
        truncates=True,
    )
    sample.edit(logits, torch.empty(NUM_TOKENS, dtype=torch.int64), torch.empty(NUM_TOKENS))
    token_ids = sample.choose(sample.adjust(logits, counts, table), counts, table)[0]
    # Of the tokens of some rows, and of prompts.
    for rows in (torch.empty(NUM_TOKENS, dtype=torch.int64), None):
        find_logprobs(logits, token_ids, rows=rows, max_top=5)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--capabilities", type=int, nargs="+", choices=MAX_SHARED_BYTES, default=list(MAX_SHARED_BYTES))
    sizes = TENSOR_PARALLEL_SIZES
    parser.add_argument("--tensor-parallel-sizes", type=int, nargs="+", choices=sizes, default=list(sizes))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args(arguments)
    with ProcessPoolExecutor() as pool:
        jobs = list(product(args.capabilities, args.tensor_parallel_sizes, args.forms))
        num_kernels = sum(pool.map(compile_kernels, *zip(*jobs, strict=True)))
    sys.stderr.write(f"Triton {triton.__version__}: compiled {num_kernels} kernels into {triton.knobs.cache.dir}.\n")


if __name__ == "__main__":
    main()
