"""The KV cache's memory on one rank: how many blocks fit, and the tensors. Knows no requests."""

import math

import numpy as np
import torch

from workers.attention.backend import KVCaches
from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.kernels.quantized_kv import KV_DTYPES, Cache, QuantizedKV


def num_blocks_that_fit(config: EngineConfig, device: torch.device, *, reserved_bytes: int = 0) -> int:
    """Usable blocks on this rank. On CUDA, call it after a profiling pass so that peak activations are known. `reserved_bytes`: of the
    device's memory that seems free, what something else is going to take.

    Raises ConfigError when not even one block fits.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        stats = torch.cuda.memory_stats(device)
        # What the profiling pass used beyond what is held now must stay free for the next pass.
        activations = stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]
        reserved_unused = stats["reserved_bytes.all.current"] - stats["allocated_bytes.all.current"]
        budget = int(
            free + reserved_unused - reserved_bytes - activations - (1 - config.gpu_memory_utilization) * total
        )
        remedy = "Raise --gpu-memory-utilization, lower --max-num-batched-tokens or use more tensor-parallel ranks."
        param = "--gpu-memory-utilization"
    else:
        budget, remedy, param = config.kv_cache_bytes, "Raise --kv-cache-memory.", "--kv-cache-memory"
    num_blocks = config.num_kv_blocks_within(budget)
    if num_blocks < 1:
        raise ConfigError(
            f"No room for the KV cache: {max(0, budget) / 2**20:.0f} MiB are left and one block of "
            f"{config.block_size} tokens takes {config.kv_block_bytes / 2**20:.2f} MiB.",
            remedy=remedy,
            param=param,
        )
    return num_blocks


def allocate(config: EngineConfig, num_blocks: int, dtype: torch.dtype, device: torch.device) -> KVCaches:
    """The caches of all layers with `num_blocks` + 1 blocks each, zeroed, in `dtype` or as the configuration says. Block 0 is the null
    block.

    One layer of each group has the same tensors: they use different blocks of them.

    Zeros, not garbage: masked positions still enter a product, and 0 * NaN is NaN.
    """
    heads = config.model.kv_heads_per_rank(config.tensor_parallel_size)
    shape = (num_blocks + 1, config.block_size, heads, config.model.head_dim)

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if device.type == "cpu":
            # numpy asks the system for zero pages, which cost nothing until they are written: 3 s less start-up per GiB.
            return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device).view(dtype).view(shape)

    def cache() -> Cache:
        if config.kv_cache_dtype == "auto":
            return zeros(shape, dtype)
        scales = zeros((num_blocks + 1, heads, config.block_size), torch.float32)
        return QuantizedKV(zeros(shape, KV_DTYPES[config.kv_cache_dtype]), scales)

    caches = [(cache(), cache()) for _ in range(config.model.layers_per_group)]
    layers = {layer: caches[i] for group in config.model.layer_groups for i, layer in enumerate(group.layers)}
    return [layers[layer] for layer in range(config.model.num_hidden_layers)]
