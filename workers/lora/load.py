"""Reads an adapter into host memory: this rank's rows of B and columns of A, in the form that the device's tables want.

Runs beside a serving engine: on its caller's thread alone, and with a break after each piece of work, so that no step waits long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from workers.checkpoint.regular_file import shown
from workers.errors import CheckpointError
from workers.kernels.lora.host_memory import HostMemory
from workers.kernels.lora.table import LoraMatrices, NumbersError
from workers.lora.layer import LoraLayer, LoraModule
from workers.lora.peft_folder import AdapterFiles, LoraPair
from workers.native.openmp import set_threads_of_this_thread


def load_matrices(
    files: AdapterFiles, layers: Sequence[LoraLayer], *, take_break: Callable[[], None]
) -> list[Any | None]:
    """For each layer what its table prepared; None where the adapter leaves it alone. Raises CheckpointError.

    take_break: called after each piece of work.
    """
    # More threads than cores, in all pools together, would make the engine's wait for each other in their sleep.
    set_threads_of_this_thread(1)
    memory = HostMemory(take_break)
    try:
        with safe_open(files.weights, framework="pt") as file:
            return [_prepare(file, files, layer, memory, take_break) for layer in layers]
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{files.weights} cannot be read: {e}.", remedy="Download or save the adapter again."
        ) from e


def _prepare(
    file: Any, files: AdapterFiles, layer: LoraLayer, memory: HostMemory, take_break: Callable[[], None]
) -> Any | None:
    pairs = [files.pairs.get((layer.layer, module.name)) for module in layer.modules]
    if not any(pairs):
        return None
    parts: list[LoraMatrices | None] = []
    for pair, module in zip(pairs, layer.modules, strict=True):
        take_break()
        parts.append(None if pair is None else _matrices(file, pair, module))
    try:
        return layer.table.prepare(parts, memory)
    except NumbersError as e:
        pair = pairs[e.shard]
        assert pair is not None, "it has numbers"
        raise CheckpointError(
            f"{shown(pair.a if e.half == 'A' else pair.b)} in {files.weights} has {e}.",
            remedy="Save or train the adapter again.",
        ) from e


def _matrices(file: Any, pair: LoraPair, module: LoraModule) -> LoraMatrices:
    """Where one slice is all that this rank has of a matrix, it is read when it is prepared."""
    b = file.get_slice(pair.b)
    rows: list[torch.Tensor] = [b[part] for part in module.rows]
    return LoraMatrices(
        file.get_slice(pair.a)[:, module.columns], rows[0] if len(rows) == 1 else torch.cat(rows), pair.scale
    )
