"""A checkpoint folder as a mapping from tensor names to tensors that are read only where they are indexed.

Reads the safetensors files of either layout and gives every tensor its Hugging Face name. Knows no model and no ranks.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from workers.errors import CheckpointError
from workers.model_numbers import Layout
from workers.quant.method import Index
from workers.weights.files import weight_files
from workers.weights.left_out import describe_left_out
from workers.weights.names import name_in_model

log = logging.getLogger(__name__)


class CheckpointTensor:
    """A `WeightSource` in a memory-mapped safetensors file. dtype: as the file names it, "BF16"."""

    def __init__(self, file: safe_open, tensor_name: str, path: Path) -> None:
        self.name = f"Tensor {tensor_name!r} of {path}"
        self._slice = file.get_slice(tensor_name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = str(self._slice.get_dtype())

    def __getitem__(self, index: Index) -> torch.Tensor:
        try:
            return self._slice[index if self.shape else ...]  # a single number cannot be sliced
        except SafetensorError as e:
            raise CheckpointError(f"{self.name} cannot be read: {e}.") from e


@contextlib.contextmanager
def open_checkpoint(folder: str | Path, layout: Layout) -> Iterator[dict[str, CheckpointTensor]]:
    """Every tensor by its Hugging Face name, with its rows as they are stored. They are readable until the context ends.

    Raises CheckpointError if there are no weights, a file is missing, truncated or not safetensors, or a tensor appears twice.
    """
    tensors: dict[str, CheckpointTensor] = {}
    paths: dict[str, Path] = {}
    names: list[str] = []
    with contextlib.ExitStack() as stack:
        for path in weight_files(Path(folder), layout):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as e:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file ({e}).", remedy="Download it again."
                ) from e
            for name in file.keys():  # noqa: SIM118 (not a dict)
                names.append(name)
                known_as = name_in_model(name, layout)
                if known_as is None:
                    continue
                if name in paths:
                    raise CheckpointError(
                        f"Tensor {name!r} is in both {paths[name]} and {path.name}.", remedy="Remove one of the files."
                    )
                paths[name] = path
                tensors[known_as] = CheckpointTensor(file, name, path)
        if (left_out := describe_left_out(names)) is not None:
            log.info("Left out: %s.", left_out)
        yield tensors
