"""The tensors of one quantised matrix, and the sentences for what is missing or wrong of them. Knows no format and no values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from workers.errors import CheckpointError
from workers.weights.header import TensorInfo


class TensorHeader(Protocol):
    """dtype: as safetensors name it, "I32". name: the tensor and its file, for messages."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class NamedHeader:
    """See `TensorHeader`. info: where the tensor is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    info: TensorInfo

    @classmethod
    def of(cls, tensor_name: str, info: TensorInfo) -> "NamedHeader":
        return cls(f"Tensor {tensor_name!r} of {info.path}", info.dtype, info.shape, info)


FLOATS = ("F16", "BF16", "F32")


def require(
    module: str, tensors: Mapping[str, TensorHeader], suffixes: tuple[str, ...], *, optional: tuple[str, ...] = ()
) -> None:
    """Raises CheckpointError unless the module has all of these tensors, and no others but optional ones."""
    for suffix, tensor in tensors.items():
        if suffix not in (*suffixes, *optional):
            raise CheckpointError(
                f"{tensor.name} is of another format than the rest of the matrix {module}.",
                remedy="Download the checkpoint again, all files of one revision.",
            )
    for suffix in suffixes:
        if suffix not in tensors:
            present = next(iter(tensors.values()))
            raise CheckpointError(
                f"The quantized matrix {module} lacks its tensor {module}.{suffix}; it has {present.name}.",
                remedy="Download the checkpoint again, all files of one revision.",
            )


def check(tensor: TensorHeader, *, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raises CheckpointError for another type or shape."""
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.name} is of type {tensor.dtype}, but its format has {' or '.join(dtypes)} there.",
            remedy="Use a checkpoint whose quantization_config belongs to its weights.",
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.name} has shape {list(tensor.shape)}, but the model's configuration asks for {list(shape)}.",
            remedy="Use a checkpoint whose configuration belongs to its weights.",
        )


def number_of_groups(tensor: TensorHeader, num_inputs: int, *, dim: int) -> int:
    """How many groups of inputs a tensor of scales has along `dim`. Raises CheckpointError if they cannot be of one size."""
    num_groups = tensor.shape[dim] if len(tensor.shape) == 2 else 0
    if num_groups < 1 or num_inputs % num_groups:
        raise CheckpointError(
            f"{tensor.name} has shape {list(tensor.shape)}, which does not divide {num_inputs} inputs into equal groups.",
            remedy="Use a checkpoint whose group size divides its matrices.",
        )
    return num_groups
