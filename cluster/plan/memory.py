"""What the GPU memory of one rank holds: weights, activations, the share CUDA needs, and how many KV blocks fit in the rest.

Arithmetic only, the same as the engine's: layer shapes as in workers/model, the budget as workers/kv_cache/tensors.py computes it from the
driver's figures, and blocks by the rule of EngineConfig. Knows no speed and no price.
"""

from dataclasses import dataclass

from cluster.plan.gpus import GIB, Gpu
from workers.config import DTYPE_BYTES, EngineConfig
from workers.device.model_bytes import lora_bytes, lora_tables, rotary_bytes, weight_bytes

# Assumed, because only a start on the GPU can measure it: the CUDA context with the cuBLAS workspace and the allocator's rounding, and
# NCCL's buffers if there is more than one rank.
CUDA_CONTEXT_BYTES = GIB // 2
NCCL_BYTES = GIB // 2
PROMPT_LOGITS_AT_ONCE = 128  # as in workers/engine/execution/model_runner.py
DEQUANTIZED_BYTES = 32 << 20  # as WORKSPACE_BYTES in workers/quant/pack_cuda.py
DRIVER_BYTES_PER_GRAPH = 8 << 20  # as in workers/engine/execution/graphs/cuda_graphs.py
_PROFILE_BLOCKS = 2  # the profiling pass runs against a cache of one block and the null block


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank.

    kv_cache_bytes: negative if the weights alone do not fit; the missing amount. num_kv_blocks: what the engine will report.
    chunk_blocks: see `chunk_blocks`. num_groups: of layers with the same window, each of which has its own blocks. adapter_bytes: of the
    slots for adapters.
    """

    total_bytes: int
    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    reserved_bytes: int
    kv_cache_bytes: int
    block_bytes: int
    block_size: int
    num_groups: int
    num_kv_blocks: int
    num_sequences: int
    blocks_per_sequence: int
    chunk_blocks: int
    adapter_bytes: int = 0

    @property
    def needed_blocks(self) -> int:
        """The blocks for every sequence of the workload at its full length."""
        return self.num_sequences * self.blocks_per_sequence + self.chunk_blocks

    @property
    def fits(self) -> bool:
        return self.num_kv_blocks >= self.needed_blocks

    @property
    def missing_bytes(self) -> int:
        """How much more memory the workload needs on this rank; 0 if it fits."""
        return 0 if self.fits else (self.needed_blocks + 1) * self.block_bytes - self.kv_cache_bytes

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of whole contexts: a token has a block in each group of layers."""
        return self.num_kv_blocks // self.num_groups * self.block_size

    @property
    def max_sequences(self) -> int:
        """How many sequences of full length fit in the cache at once, at most the workload's number."""
        return min(self.num_sequences, max(0, self.num_kv_blocks - self.chunk_blocks) // self.blocks_per_sequence)


def rank_memory(config: EngineConfig, gpu: Gpu) -> RankMemory:
    """How `config` uses a GPU's memory. The workload is `config.max_num_seqs` sequences of `config.max_model_len` tokens."""
    usable = int(config.gpu_memory_utilization * gpu.memory_bytes)
    weights = weight_bytes(config) + rotary_bytes(config)
    activations = activation_bytes(config) + _PROFILE_BLOCKS * config.kv_block_bytes
    nccl = NCCL_BYTES if config.tensor_parallel_size > 1 else 0
    reserved = CUDA_CONTEXT_BYTES + nccl + graph_bytes(config)
    adapters = lora_bytes(config)
    kv_cache = usable - weights - adapters - activations - reserved
    return RankMemory(
        total_bytes=gpu.memory_bytes,
        usable_bytes=usable,
        weight_bytes=weights,
        activation_bytes=activations,
        reserved_bytes=reserved,
        kv_cache_bytes=kv_cache,
        block_bytes=config.kv_block_bytes,
        block_size=config.block_size,
        num_groups=len(config.model.layer_groups),
        num_kv_blocks=max(0, config.num_kv_blocks_within(kv_cache)),
        num_sequences=config.max_num_seqs,
        blocks_per_sequence=blocks_per_sequence(config),
        chunk_blocks=chunk_blocks(config),
        adapter_bytes=adapters,
    )


def activation_bytes(config: EngineConfig) -> int:
    """The most bytes that the tensors of one step hold at a time, as the engine's profiling pass measures it."""
    model, itemsize = config.model, DTYPE_BYTES[config.dtype]
    tokens = config.max_num_batched_tokens
    stream = tokens * model.hidden_size * itemsize
    # An embedding is read in float64.
    embedding = stream + tokens * model.hidden_size * 8
    # In float32, and their log-softmax.
    logits = stream + max(config.max_num_seqs, PROMPT_LOGITS_AT_ONCE) * 2 * 4 * model.vocab_size
    layer = _layer_bytes(config, tokens) + _product_bytes(config, tokens) + _adapter_sums_bytes(config, tokens)
    return max(layer, embedding, logits)


def _adapter_sums_bytes(config: EngineConfig, tokens: int) -> int:
    """A x of every row, in parts of 1,024 inputs, as workers/kernels/lora/lora_matmul.py has them."""
    if not config.enable_lora or config.device != "cuda":
        return 0
    rank = -(-config.max_lora_rank // 16) * 16
    return max(tokens * len(outputs) * -(-inputs // 1024) * rank * 4 for inputs, outputs in lora_tables(config))


def _product_bytes(config: EngineConfig, tokens: int) -> int:
    """What a product with quantised weights holds besides its operands: on a GPU a part of the weights, or the inputs in 8 bits."""
    model = config.model
    if config.device != "cuda" or (config.quantization is None and model.stored is None):
        return 0
    if config.quantization == "fp8":
        return tokens * model.intermediate_per_rank(config.tensor_parallel_size)
    return DEQUANTIZED_BYTES


def graph_bytes(config: EngineConfig) -> int:
    """What the graphs of decode steps take: what the driver keeps of each, their tensors, and the buffers that they read and write."""
    if not config.cuda_graphs:
        return 0
    model, itemsize, seqs = config.model, DTYPE_BYTES[config.dtype], config.max_num_seqs
    num_graphs = num_decode_graphs(seqs)
    block_table = len(model.layer_groups) * seqs * _blocks_for(config, config.max_model_len) * 4
    logits = seqs * model.vocab_size * 4
    buffers = block_table + logits + seqs * model.hidden_size * itemsize
    tensors = max(_layer_bytes(config, seqs), logits + seqs * model.vocab_size * itemsize)
    return num_graphs * DRIVER_BYTES_PER_GRAPH + buffers + tensors


def num_decode_graphs(max_num_seqs: int) -> int:
    """As many as there are sizes of decode steps in workers/engine/execution/graphs/decode_padding.py."""
    sizes = (1, 2, 4, 8, 16, 32, 48, *range(64, max_num_seqs, 32))
    return sum(size < max_num_seqs for size in sizes) + 1


def _layer_bytes(config: EngineConfig, tokens: int) -> int:
    """The most bytes that the tensors of a layer hold at a time, with the fused kernels."""
    model, size, itemsize = config.model, config.tensor_parallel_size, DTYPE_BYTES[config.dtype]
    q = model.num_attention_heads * model.head_dim // size
    qkv = q + 2 * model.kv_heads_per_rank(size) * model.head_dim
    angles = tokens * 2 * model.head_dim * 4
    # What the layer before gave and its residual stream, the normed copy and the new residual stream, and the result.
    streams = 5 * tokens * model.hidden_size * itemsize
    # Also q, k and v as computed, the rotated queries, and what they attended to.
    attention = tokens * (qkv + 2 * q) * itemsize
    # Or gate and up, and silu(gate) * up.
    mlp = tokens * 3 * model.intermediate_per_rank(size) * itemsize
    return angles + streams + max(attention, mlp)


def blocks_per_sequence(config: EngineConfig) -> int:
    """The most blocks a decoding sequence of `max_model_len` tokens holds, in all groups of layers.

    With a window of 4,096 and blocks of 16 a query sees 4,096 keys, which lie in at most 257 blocks: 256, and one more where the window
    starts within a block. At 2,048 tokens of context it holds 128, with or without the window.
    """
    return sum(_blocks_in_sight(config, group.window) for group in config.model.layer_groups)


def chunk_blocks(config: EngineConfig) -> int:
    """The blocks a step may hold beyond that: while a chunk of a prompt is computed, the keys its first token sees are still held."""
    whole, chunk = _blocks_for(config, config.max_model_len), _blocks_for(config, config.max_num_batched_tokens)
    unseen = (whole - _blocks_in_sight(config, group.window) for group in config.model.layer_groups)
    return sum(min(chunk, config.max_num_seqs * num_blocks) for num_blocks in unseen)


def _blocks_in_sight(config: EngineConfig, window: int | None) -> int:
    whole = _blocks_for(config, config.max_model_len)
    return whole if window is None else min(whole, _blocks_for(config, window) + 1)


def _blocks_for(config: EngineConfig, num_tokens: int) -> int:
    return -(-num_tokens // config.block_size)
