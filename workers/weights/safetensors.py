"""A checkpoint folder as a mapping from tensor names to tensors that are read only where they are indexed.

Reads the safetensors files of either layout and gives every tensor its Hugging Face name and row order, so that only this file knows
Mistral's own layout. Knows no model and no ranks.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from workers.config import Layout
from workers.errors import CheckpointError
from workers.quant.method import Index
from workers.weights.files import weight_files
from workers.weights.names import BUFFERS, huggingface_name


class CheckpointTensor:
    """A `WeightSource` in a memory-mapped safetensors file."""

    def __init__(self, file: safe_open, tensor_name: str, path: Path) -> None:
        self.name = f"Tensor {tensor_name!r} of {path}"
        self._slice = file.get_slice(tensor_name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, index: Index) -> torch.Tensor:
        try:
            return self._slice[index]
        except SafetensorError as e:
            raise CheckpointError(f"{self.name} cannot be read: {e}.") from e


class InterleavedRows:
    """A q or k weight of Mistral's layout, read in Hugging Face's row order.

    Mistral rotates adjacent pairs of a head's rows, Hugging Face pairs half a head apart. With head_dim 4:
        Mistral       a0 b0 a1 b1           rotates (a0, b0) and (a1, b1)
        Hugging Face  a0 a1 b0 b1           rotates the same two pairs
    Only whole heads can be read.
    """

    def __init__(self, source: CheckpointTensor, head_dim: int) -> None:
        self.name = source.name
        self.shape = source.shape
        self._source = source
        self._head_dim = head_dim

    def __getitem__(self, index: Index) -> torch.Tensor:
        assert isinstance(index, slice), "only rows of q and k are divided"
        start, stop, _ = index.indices(self.shape[0])
        assert start % self._head_dim == 0 and stop % self._head_dim == 0, (start, stop, self._head_dim)
        rows = self._source[start:stop]
        return rows.view(-1, self._head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


@contextlib.contextmanager
def open_checkpoint(
    folder: str | Path, layout: Layout, *, head_dim: int
) -> Iterator[dict[str, CheckpointTensor | InterleavedRows]]:
    """Every tensor by its Hugging Face name. They are readable until the context ends.

    Raises CheckpointError if there are no weights, a file is missing, truncated or not safetensors, or a tensor appears twice.
    """
    tensors: dict[str, CheckpointTensor | InterleavedRows] = {}
    paths: dict[str, Path] = {}
    with contextlib.ExitStack() as stack:
        for path in weight_files(Path(folder), layout):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as e:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file ({e}).", remedy="Download it again."
                ) from e
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if BUFFERS.fullmatch(name):
                    continue
                if name in paths:
                    raise CheckpointError(
                        f"Tensor {name!r} is in both {paths[name]} and {path.name}.", remedy="Remove one of the files."
                    )
                paths[name] = path
                tensor = CheckpointTensor(file, name, path)
                if layout == "huggingface":
                    tensors[name] = tensor
                elif (
                    re.search(r"\.attention\.w[qk]\.weight$", name)
                    and len(tensor.shape) == 2
                    and not tensor.shape[0] % head_dim
                ):
                    tensors[huggingface_name(name)] = InterleavedRows(tensor, head_dim)
                else:
                    tensors[huggingface_name(name)] = tensor
        yield tensors
