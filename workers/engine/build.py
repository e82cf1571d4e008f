"""Builds the model on one rank: threads, attention backend, weight format, weights. The only place that knows all these parts."""

import logging
from collections.abc import Callable

import torch

from workers.attention.select import select_backend
from workers.config import EngineConfig
from workers.device.cpu import usable_cores
from workers.engine.execution.graphs.cpu_graphs import NativeGraphRecorder
from workers.engine.execution.graphs.cuda_graphs import CudaGraphRecorder, GraphRecorder
from workers.engine.execution.model_runner import ModelRunner
from workers.kernels.layers.layer_kernels import select_layer_kernels
from workers.kernels.lora.select import select_lora
from workers.lora.rank_adapters import RankAdapters
from workers.model.mistral import MistralForCausalLM
from workers.native.library import NativeLibrary, load_library
from workers.parallel.group import TensorParallel
from workers.quant.select import select_methods
from workers.quant.stored import describe_stored
from workers.weights.forms import read_forms
from workers.weights.loader import Progress, load_weights

log = logging.getLogger(__name__)


def build_runner(
    config: EngineConfig,
    tp: TensorParallel,
    progress: Progress | None = None,
    *,
    load: Callable[[MistralForCausalLM], None] | None = None,
) -> ModelRunner:
    """The model with this rank's weights. `progress` gets (bytes done, bytes in total). load: fills the parameters; None reads the
    checkpoint.

    Raises CheckpointError for weights that do not fit the configuration, ConfigError for a GPU that cannot run what it asks for.
    """
    num_threads = None
    if tp.device.type == "cpu":
        # One while loading, which runs on another thread than computing: see ModelRunner.execute.
        torch.set_num_threads(1)
        num_threads = config.num_threads or max(1, usable_cores() // tp.size)
    dtype: torch.dtype = getattr(torch, config.dtype)
    library = _library(tp.device)
    model_config = config.model
    selection = select_backend(
        device=tp.device,
        dtype=dtype,
        block_size=config.block_size,
        num_heads=model_config.num_attention_heads // tp.size,
        num_kv_heads=model_config.kv_heads_per_rank(tp.size),
        head_dim=model_config.head_dim,
        sliding_window=model_config.widest_window,
        choice=config.attention_backend,
        kv_cache_dtype=config.kv_cache_dtype,
        deterministic=config.deterministic,
    )
    backend = selection.backend
    lora = None
    if config.enable_lora:
        lora = select_lora(
            tp.device, dtype=dtype, num_slots=config.max_loras, max_rank=config.max_lora_rank, library=library
        )
    model = MistralForCausalLM(
        model_config,
        tp=tp,
        # Each plans for its own blocks.
        backends=[backend, *(selection.new(group.window) for group in model_config.layer_groups[1:])],
        dtype=dtype,
        device=tp.device,
        max_positions=config.max_model_len,
        methods=select_methods(
            tp.device,
            forms=read_forms(config.model_path, model_config) if load is None else {},
            shards=MistralForCausalLM.packed_modules,
            quantization=config.quantization,
            library=library,
            deterministic=config.deterministic,
        ),
        kernels=select_layer_kernels(tp.device, dtype=dtype, library=library),
        lora=lora,
    )
    if load is None:
        load_weights(model, config.model_path, model_config, progress=progress)
        if (found := describe_stored(model.modules())) is not None:
            log.info("%s", found)
    else:
        load(model)
    adapters = None
    if config.enable_lora:
        adapters = RankAdapters(
            model.lora_layers(),
            model=model_config,
            num_slots=config.max_loras,
            max_rank=config.max_lora_rank,
        )
    recorder = _graph_recorder(config, tp, library=library, attention_backend=backend.name)
    return ModelRunner(
        config,
        model,
        tp,
        dtype=dtype,
        attention_backend=backend.name,
        num_threads=num_threads,
        pads_decodes=tp.device.type == "cuda" or recorder is not None,
        graph_recorder=recorder,
        adapters=adapters,
    )


def _library(device: torch.device) -> NativeLibrary | None:
    """The kernels compiled for this CPU, if there are any; logs which, or why there are none."""
    if device.type != "cpu":
        return None
    library = load_library()
    if isinstance(library, NativeLibrary):
        log.info("The CPU computes with the compiled kernels %s.", library.variant)
        return library
    log.warning("The CPU computes without compiled kernels, more slowly. %s", library.reason)
    return None


def _graph_recorder(
    config: EngineConfig, tp: TensorParallel, *, library: NativeLibrary | None, attention_backend: str
) -> GraphRecorder | None:
    """None where decode steps launch their kernels one by one."""
    if not config.cuda_graphs:
        return None
    if tp.device.type == "cpu":
        return NativeGraphRecorder(library, tp) if library is not None and attention_backend == "native" else None
    if attention_backend == "sdpa":
        log.warning(
            "Decode steps run without CUDA graphs, because the reference backend of attention plans on the host."
        )
        return None
    return CudaGraphRecorder(tp.device)
