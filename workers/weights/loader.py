"""Fills a model from a checkpoint, reading only this rank's part, and proves that every parameter was filled exactly once.

Knows how parameters are named and packed; each parameter's own `weight_loader` knows which part is this rank's, and
checkpoint.py where tensors lie.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from workers.config import ModelConfig
from workers.errors import CheckpointError
from workers.layers.embedding import ParallelLMHead
from workers.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from workers.model.mistral import MistralForCausalLM
from workers.parallel.group import TensorParallel
from workers.weights.safetensors import open_checkpoint

Progress = Callable[[int, int], None]


@torch.no_grad()
def load_weights(
    model: MistralForCausalLM,
    folder: str | Path,
    config: ModelConfig,
    *,
    tp: TensorParallel,
    progress: Progress | None = None,
) -> None:
    """Fills every parameter of `model` from the checkpoint in `folder`, then packs what computes faster packed.

    `progress(bytes_done, bytes_total)` counts the bytes of this rank's parameters; without it, rank 0 shows a bar on a terminal.
    Raises CheckpointError, naming file and tensor, if a tensor is missing, extra or misshapen, or a file is absent or truncated.
    """
    targets = _targets(model)
    parameters = dict(model.named_parameters())
    num_bytes = sum(parameter.nbytes for parameter in parameters.values())
    filled: Counter[str] = Counter()
    with (
        open_checkpoint(folder, config.layout, head_dim=config.head_dim) as sources,
        _reporting(num_bytes, tp, progress) as report,
    ):
        if config.tie_word_embeddings:
            sources.pop("lm_head.weight", None)  # some files repeat the embedding here
        if missing := sorted(targets.keys() - sources.keys()):
            raise CheckpointError(f"{folder} lacks the tensor {_first(missing)}.")
        if extra := sorted(sources.keys() - targets.keys()):
            names = _first([sources[name].name for name in extra])
            raise CheckpointError(f"{names} has no place in a {config.num_hidden_layers}-layer Mistral model.")
        for name, source in sources.items():
            parameter_name, shard_id = targets[name]
            parameter = parameters[parameter_name]
            num_elements = parameter.weight_loader(parameter, source, shard_id)  # type: ignore[attr-defined]
            filled[parameter_name] += num_elements
            report(num_elements * parameter.element_size())
    for name, parameter in parameters.items():
        assert filled[name] == parameter.numel(), (
            f"{name} has {parameter.numel()} elements, but {filled[name]} were filled"
        )
    for module in model.modules():
        if isinstance(module, (MergedColumnParallelLinear, RowParallelLinear, ParallelLMHead)):
            module.pack()


def _targets(model: MistralForCausalLM) -> dict[str, tuple[str, str | None]]:
    """{tensor name in the checkpoint: (parameter name, shard id)}, for example
    {"model.norm.weight": ("model.norm.weight", None), "...self_attn.k_proj.weight": ("...self_attn.qkv_proj.weight", "k")}.
    """
    targets: dict[str, tuple[str, str | None]] = {}
    for name, _ in model.named_parameters():
        module = name.split(".")[-2]
        if module in model.packed_modules:
            for checkpoint_module, shard_id in model.packed_modules[module].items():
                targets[name.replace(f".{module}.", f".{checkpoint_module}.")] = (name, shard_id)
        else:
            targets[name] = (name, None)
    return targets


@contextlib.contextmanager
def _reporting(num_bytes: int, tp: TensorParallel, progress: Progress | None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes newly done."""
    done = 0

    def call(new: int) -> None:
        nonlocal done
        done += new
        assert progress is not None
        progress(done, num_bytes)

    if progress is not None:
        yield call
        return
    hidden = tp.rank != 0 or not sys.stderr.isatty()
    with tqdm(total=num_bytes, desc="Loading weights", unit="B", unit_scale=True, disable=hidden) as bar:
        yield bar.update


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
