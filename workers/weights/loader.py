"""Fills a model from a checkpoint, reading only this rank's part, and proves that every parameter was filled exactly once.

Knows how parameters are named and packed; each parameter's own `weight_loader` knows which part is this rank's, and safetensors.py
where tensors are. Knows no architecture.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from workers.config import ModelConfig
from workers.errors import CheckpointError
from workers.layers.linear import FinishesLoading
from workers.quant.method import Index, WeightSource
from workers.quant.quantized import StoredValues, is_finite
from workers.weights.interleaved import InterleavedRows
from workers.weights.names import EMBEDDING, HEAD, expected_shapes
from workers.weights.quantized.matrices import open_matrices
from workers.weights.safetensors import open_checkpoint

# Called with (bytes done, bytes in total) of this rank's parameters.
Progress = Callable[[int, int], None]


class CheckpointModel(Protocol):
    """The part of an nn.Module that loading needs. `packed_modules`: {module here: {module in the checkpoint: its shard}}."""

    @property
    def packed_modules(self) -> Mapping[str, Mapping[str, str]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...


@torch.no_grad()
def load_weights(
    model: CheckpointModel, folder: str | Path, config: ModelConfig, *, progress: Progress | None = None
) -> None:
    """Fills every parameter of `model` from the checkpoint in `folder`, then brings weights into the form that computes fastest.

    Raises CheckpointError with the file and tensor if a tensor is missing, extra or has the wrong shape, or a file is missing or
    truncated.
    """
    targets = _targets(model)
    parameters = dict(model.named_parameters())
    num_bytes = sum(parameter.nbytes for parameter in parameters.values())
    num_bytes_done = 0
    num_missing = {name: parameter.numel() for name, parameter in parameters.items()}
    unfinished = _Unfinished(model)
    with open_sources(folder, config) as sources:
        # Some files repeat the embedding here.
        repeated = sources.pop(HEAD, None) if config.tie_word_embeddings else None
        if config.tie_word_embeddings and HEAD in targets and EMBEDDING in sources:
            # The head keeps the stored form, which the embedding's table does not.
            sources[HEAD] = sources[EMBEDDING]
        if missing := sorted(targets.keys() - sources.keys()):
            raise CheckpointError(f"{folder} lacks the tensor {_first(missing)}.")
        if extra := sorted(sources.keys() - targets.keys()):
            names = _first([sources[name].name for name in extra])
            raise CheckpointError(f"{names} has no place in a {config.num_hidden_layers}-layer Mistral model.")
        for name, source in sources.items():
            parameter_name, shard_id = targets[name]
            parameter = parameters[parameter_name]
            num_elements = parameter.weight_loader(parameter, FiniteTensor(source), shard_id)  # type: ignore[attr-defined]
            num_missing[parameter_name] -= num_elements
            num_bytes_done += num_elements * parameter.element_size()
            if progress is not None:
                progress(num_bytes_done, num_bytes)
            if num_missing[parameter_name] == 0 and parameter_name != EMBEDDING:
                # Not to hold it any longer than its layer does.
                del parameter, parameters[parameter_name]
                unfinished.is_filled(parameter_name)
        if repeated is not None:
            _check_repeated(parameters[EMBEDDING], repeated)
    for name, number in num_missing.items():
        assert number == 0, f"of the elements of {name}, {number} were not filled"
    unfinished.is_filled(EMBEDDING)
    unfinished.check()


class _Unfinished:
    """Lets each layer prepare its weight as soon as its parameters are filled. So only one layer at a time takes the memory of the form
    that is loaded, which may be twice that of the form that computes.
    """

    def __init__(self, model: CheckpointModel) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._waiting: list[tuple[FinishesLoading, set[str]]] = [
            (module, {names[id(parameter)] for parameter in module.parameters(recurse=False)})
            for module in model.modules()
            if isinstance(module, FinishesLoading)
        ]

    def is_filled(self, name: str) -> None:
        for _, missing in self._waiting:
            missing.discard(name)
        for module in [module for module, missing in self._waiting if not missing]:
            module.finish_loading()
        self._waiting = [waiting for waiting in self._waiting if waiting[1]]

    def check(self) -> None:
        assert not self._waiting, "every parameter is filled"


@contextlib.contextmanager
def open_sources(location: str | Path, config: ModelConfig) -> Iterator[dict[str, WeightSource]]:
    """Every tensor by its Hugging Face name, readable until the context ends. Raises CheckpointError."""
    if config.layout == "gguf":
        from workers.weights.gguf.open import open_gguf  # late: the package that reads such files imports a lot

        yield open_gguf(location, head_dim=config.head_dim)
        return
    with open_checkpoint(location, config.layout) as tensors:
        sources: dict[str, WeightSource] = {**tensors}
        if config.stored is not None:
            sources = open_matrices(tensors, config.stored, expected_shapes(config))
        yield {name: _in_order(name, source, config) for name, source in sources.items()}


def _in_order(name: str, source: WeightSource, config: ModelConfig) -> WeightSource:
    """With the rows of q and k in Hugging Face's order."""
    is_interleaved = config.layout == "mistral" and name.endswith((".q_proj.weight", ".k_proj.weight"))
    fits = len(source.shape) == 2 and source.shape[0] % config.head_dim == 0
    return InterleavedRows(source, config.head_dim) if is_interleaved and fits else source


class FiniteTensor:
    """A `WeightSource` that raises CheckpointError where it has NaN or infinity.

    It looks at each part just after it was read from the file: 0.7 to 0.9 ms per 10 MB on one CPU core. Of quantised parts, it looks at
    the scales.
    """

    def __init__(self, source: WeightSource) -> None:
        self.name = source.name
        self.shape = source.shape
        self._source = source

    def __getitem__(self, index: Index) -> StoredValues:
        values = self._source[index]
        if not (is_finite(values) if isinstance(values, torch.Tensor) else values.is_finite()):
            what = "values" if isinstance(values, torch.Tensor) else "values or scales"
            raise CheckpointError(
                f"{self.name} has NaN or infinite {what}.", remedy="Use a checkpoint whose weights are all finite."
            )
        return values


def _check_repeated(embedding: nn.Parameter, source: WeightSource) -> None:
    """Raises CheckpointError if a tied checkpoint has an output head of its own, which would be dropped."""
    head = nn.Parameter(torch.empty_like(embedding).copy_(embedding), requires_grad=False)
    embedding.weight_loader(head, source, None)  # type: ignore[attr-defined]
    if not torch.equal(head, embedding):
        raise CheckpointError(
            f"{source.name} differs from the embedding, but config.json says that they are tied.",
            remedy="Set tie_word_embeddings to false in config.json.",
        )


def _targets(model: CheckpointModel) -> dict[str, tuple[str, str | None]]:
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


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
