"""Builds the model on one rank: threads, attention backend, weight format, weights. The only place that knows all these parts."""

import os

import torch

from workers.attention.select import select_backend
from workers.config import EngineConfig
from workers.engine.model_runner import ModelRunner
from workers.model.mistral import MistralForCausalLM
from workers.parallel.group import TensorParallel
from workers.quant.dense import DENSE
from workers.weights.loader import Progress, load_weights


def build_runner(config: EngineConfig, tp: TensorParallel, progress: Progress | None = None) -> ModelRunner:
    """The model with this rank's weights. `progress` gets (bytes done, bytes in total).

    Raises CheckpointError for weights that do not fit the configuration.
    """
    num_threads = None
    if tp.device.type == "cpu":
        # One while loading, which runs on another thread than computing: see ModelRunner.execute.
        torch.set_num_threads(1)
        num_threads = config.num_threads or max(1, available_cpus() // tp.size)
    dtype: torch.dtype = getattr(torch, config.dtype)
    model_config = config.model
    backend = select_backend(
        device=tp.device,
        dtype=dtype,
        block_size=config.block_size,
        num_heads=model_config.num_attention_heads // tp.size,
        num_kv_heads=model_config.num_key_value_heads // tp.size,
        head_dim=model_config.head_dim,
        sliding_window=model_config.sliding_window,
    )
    model = MistralForCausalLM(
        model_config,
        tp=tp,
        backend=backend,
        dtype=dtype,
        device=tp.device,
        max_positions=config.max_model_len,
        method=DENSE,
    )
    load_weights(model, config.model_path, model_config, progress=progress)
    return ModelRunner(config, model, tp, dtype=dtype, attention_backend=backend.name, num_threads=num_threads)


def available_cpus() -> int:
    """Cores this process may use, which in a container is less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
