"""Reads an adapter into host memory: this rank's rows of B and columns of A, in the form that the device's tables want.

Runs beside a serving engine: on its caller's thread, without the other threads of a product, and in pieces, so that no step waits long.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from workers.checkpoint.regular_file import shown
from workers.errors import CheckpointError
from workers.kernels.lora.host_memory import HostMemory
from workers.kernels.lora.table import LoraMatrices
from workers.lora.layer import LoraLayer, LoraModule
from workers.lora.peft_folder import AdapterFiles, LoraPair


def load_matrices(files: AdapterFiles, layers: Sequence[LoraLayer], dtype: torch.dtype) -> list[Any | None]:
    """For each layer what its table prepared; None where the adapter leaves it alone. Raises CheckpointError."""
    try:
        memory = HostMemory()
        with _one_thread(), safe_open(files.weights, framework="pt") as file:
            return [_prepare(file, files, layer, dtype, memory) for layer in layers]
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{files.weights} cannot be read: {e}.", remedy="Download or save the adapter again."
        ) from e


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """More threads than cores, in all pools together, make the engine's wait for each other in their sleep."""
    num_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_before)


def _prepare(file: Any, files: AdapterFiles, layer: LoraLayer, dtype: torch.dtype, memory: HostMemory) -> Any | None:
    pairs = [files.pairs.get((layer.layer, module.name)) for module in layer.modules]
    if not any(pairs):
        return None
    return layer.table.prepare(
        [
            None if pair is None else _matrices(file, files.weights, pair, module, dtype)
            for pair, module in zip(pairs, layer.modules, strict=True)
        ],
        memory,
    )


def _matrices(file: Any, path: Path, pair: LoraPair, module: LoraModule, dtype: torch.dtype) -> LoraMatrices:
    b = file.get_slice(pair.b)
    rows = [b[part] for part in module.rows]
    return LoraMatrices(
        _converted(file.get_slice(pair.a)[:, module.columns], dtype, path, pair.a),
        _converted(rows[0] if len(rows) == 1 else torch.cat(rows), dtype, path, pair.b),
        pair.scale,
    )


def _converted(values: torch.Tensor, dtype: torch.dtype, path: Path, name: str) -> torch.Tensor:
    converted = values.to(dtype).contiguous()
    if not torch.isfinite(converted).all():
        beyond = torch.isfinite(values).all()
        what = f"numbers too large for {str(dtype).removeprefix('torch.')}" if beyond else "infinite numbers or NaN"
        raise CheckpointError(f"{shown(name)} in {path} has {what}.", remedy="Save or train the adapter again.")
    return converted
