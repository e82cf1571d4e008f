"""Compiles the GPU kernels ahead of time, without a GPU, into Triton's cache (TRITON_CACHE_DIR):

    python -m workers.engine.kernel_cache [--capabilities 80 86 89 90] [--tensor-parallel-sizes 1 2 4 8]

Launches what the engine launches for a Mistral 7B in bfloat16, on CPU tensors. A server with the same files of Tramontane and Triton
finds the results in the cache, and does not compile them when it starts. Other models, quantized weights, what is missing here, and
Triton's launcher, which is linked with the driver, are compiled when they are needed.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import torch
import triton

from workers.attention.backend import AttentionMetadata
from workers.attention.triton_paged import SEGMENT, TritonBackend
from workers.config import EngineConfig
from workers.kernels import sample
from workers.kernels.add_rms_norm import add_rms_norm
from workers.kernels.logprobs import find_logprobs
from workers.kernels.matmul import matmul
from workers.kernels.offline import MAX_SHARED_BYTES, compile_for
from workers.kernels.rotary_kv import rotary_kv
from workers.kernels.sample_specification import SamplingTable
from workers.kernels.silu_mul import silu_mul

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)  # of the 7B family, on one machine
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN_SIZE, INTERMEDIATE_SIZE = 4096, 14_336
VOCAB_SIZES = (32_000, 32_768)
SLIDING_WINDOWS = (None, 4096)
EPS = 1e-5
DTYPE = torch.bfloat16
BLOCK_SIZE = EngineConfig.block_size
NUM_TOKENS = 64


def compile_kernels(capability: int, tensor_parallel_size: int) -> int:
    """Compiles what one rank launches. capability: 80 for compute capability 8.0. Returns the number of kernels."""
    return len(compile_for(capability, lambda: launch_all(tensor_parallel_size)))


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
    # Of --deterministic: qkv, o, gate and up, down, and the head.
    for out_features, in_features in (
        ((heads + 2 * kv_heads) * HEAD_DIM, HIDDEN_SIZE),
        (HIDDEN_SIZE, heads * HEAD_DIM),
        (2 * intermediate, HIDDEN_SIZE),
        (HIDDEN_SIZE, intermediate),
        *((-(-vocab_size // tensor_parallel_size), HIDDEN_SIZE) for vocab_size in VOCAB_SIZES),
    ):
        matmul(empty(NUM_TOKENS, in_features), empty(out_features, in_features))


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
    args = parser.parse_args(arguments)
    with ProcessPoolExecutor() as pool:
        jobs = list(product(args.capabilities, args.tensor_parallel_sizes))
        num_kernels = sum(pool.map(compile_kernels, *zip(*jobs, strict=True)))
    sys.stderr.write(f"Triton {triton.__version__}: compiled {num_kernels} kernels into {triton.knobs.cache.dir}.\n")


if __name__ == "__main__":
    main()
