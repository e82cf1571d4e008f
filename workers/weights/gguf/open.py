"""The GGUF files of a model as a mapping from Hugging Face's names to tensors that are read only where they are indexed.

Knows no model and no ranks.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from workers.checkpoint.gguf.gguf_config import read_parts
from workers.checkpoint.gguf.gguf_file import find_gguf
from workers.checkpoint.gguf.gguf_types import EXPANDED_TYPES, is_supported
from workers.device.memory import gigabytes
from workers.errors import CheckpointError
from workers.quant.forms import Form
from workers.quant.method import WeightSource
from workers.weights.gguf.names import INTERLEAVED
from workers.weights.gguf.tensor import GgufWeights
from workers.weights.gguf.types import form_of
from workers.weights.interleaved import InterleavedRows
from workers.weights.names import EMBEDDING, HEAD, name_in_model

log = logging.getLogger(__name__)


def open_gguf(location: str | Path, *, head_dim: int) -> dict[str, WeightSource]:
    """location: the file, its first part, or its folder. Raises CheckpointError for a damaged or missing file and an unknown type.

    The files stay mapped as long as a source of them lives.
    """
    maps: dict[Path, np.ndarray] = {}
    sources: dict[str, WeightSource] = {}
    for name, tensor in read_parts(_find(location)).tensors.items():
        known_as = name_in_model(name, "gguf")
        if known_as is None:
            continue
        if not is_supported(tensor.dtype):
            raise CheckpointError(
                f"The tensor {name} in {tensor.path} is of type {tensor.dtype}, which is not supported.",
                remedy="Use a file of another type, for example Q4_K_M or Q8_0.",
            )
        if tensor.path not in maps:
            # "c": written numbers would not reach the file. torch warns of memory that cannot be written.
            maps[tensor.path] = np.memmap(tensor.path, mode="c")
        source: WeightSource = GgufWeights(tensor, name, maps[tensor.path])
        if INTERLEAVED.fullmatch(name) and tensor.shape[0] % head_dim == 0:
            source = InterleavedRows(source, head_dim)
        sources[known_as] = source
    _warn_of_expanded(sources.values())
    return sources


def _warn_of_expanded(sources: Iterable[WeightSource]) -> None:
    """Logs what matrices without an exact form take."""
    expanded = [s for s in sources if isinstance(s, GgufWeights) and s.dtype in EXPANDED_TYPES]
    if expanded:
        types, num_weights = sorted({s.dtype for s in expanded}), sum(math.prod(s.shape) for s in expanded)
        log.warning(
            "%d matrices of the types %s have no form of their own here: as plain numbers they take %s in 16 bits, and %s in float32.",
            len(expanded),
            ", ".join(types),
            gigabytes(2 * num_weights),
            gigabytes(4 * num_weights),
        )


def read_gguf_forms(location: str | Path) -> dict[str, Form]:
    """{Hugging Face's name: its form}; a tied head has the embedding's. Raises CheckpointError as `open_gguf`."""
    forms = {
        known_as: form_of(tensor.dtype)
        for name, tensor in read_parts(_find(location)).tensors.items()
        if (known_as := name_in_model(name, "gguf")) is not None
    }
    return {HEAD: forms.get(EMBEDDING)} | forms


def _find(location: str | Path) -> Path:
    file = find_gguf(Path(location))
    if file is None:
        raise CheckpointError(f"{location} has no GGUF file.", remedy="Give the file, or its folder.")
    return file
