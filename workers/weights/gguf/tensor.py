"""One tensor of a GGUF file as a source of weights that is read only where it is indexed. Knows types and blocks; no model, no ranks."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf.constants import GGML_QUANT_SIZES

from workers.checkpoint.gguf.gguf_file import GgufTensor
from workers.checkpoint.gguf.gguf_types import GROUPED_TYPES
from workers.errors import CheckpointError
from workers.quant.method import Index
from workers.quant.quantized import QuantizedTensor
from workers.weights.gguf.blocks import UNPACK
from workers.weights.gguf.types import SMALLEST_GROUP

_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GgufWeights:
    """A `WeightSource` in a memory-mapped file: of types with numbers in groups a QuantizedTensor, of the others plain floats."""

    def __init__(self, tensor: GgufTensor, tensor_name: str, data: np.ndarray) -> None:
        """data: the file's bytes."""
        self.name = f"Tensor {tensor_name!r} of {tensor.path}"
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self._block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.dtype]]
        num_blocks = tensor.shape[-1] // self._block_size
        # [num_rows, num_blocks, block_bytes]; a vector is one row.
        self._blocks = torch.from_numpy(data[tensor.start : tensor.end]).view(-1, num_blocks, block_bytes)

    def __getitem__(self, index: Index) -> torch.Tensor | QuantizedTensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        if len(self.shape) == 1:
            return self._floats(self._blocks, *rows.indices(self.shape[0])[:2])[0]
        start, stop, _ = columns.indices(self.shape[-1])
        read = self._quantized if self.dtype in GROUPED_TYPES else self._floats
        return read(self._blocks[rows], start, stop)

    def _floats(self, blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The inputs from `start` to `stop` of rows of blocks. Copied where the file's bytes are not aligned to the type."""
        first, last = start // self._block_size, -(-stop // self._block_size)
        blocks = blocks[:, first:last]
        if self.dtype in _TORCH_TYPES:
            dtype = _TORCH_TYPES[self.dtype]
            if blocks.storage_offset() % dtype.itemsize or blocks.data_ptr() % dtype.itemsize:
                blocks = blocks.clone(memory_format=torch.contiguous_format)
            return blocks.view(dtype).squeeze(2)
        values = dequantize(blocks.flatten(1).numpy(), GGMLQuantizationType[self.dtype])
        offset = first * self._block_size
        return torch.from_numpy(values)[:, start - offset : stop - offset]

    def _quantized(self, blocks: torch.Tensor, start: int, stop: int) -> QuantizedTensor:
        kind = GROUPED_TYPES[self.dtype]
        group_size = min(kind.group_size, SMALLEST_GROUP)
        if start % group_size or stop % group_size:
            raise CheckpointError(
                f"{self.name} is stored in groups of {group_size} columns, which the columns {start} to {stop - 1} of one rank divide.",
                remedy="Use a smaller --tensor-parallel-size.",
            )
        first, last = start // self._block_size, -(-stop // self._block_size)
        values, scales, minima = UNPACK[self.dtype](blocks[:, first:last])
        tensor = QuantizedTensor(
            values=values.flatten(1),
            scales=scales.flatten(1),
            minima=None if minima is None else minima.flatten(1),
            num_bits=kind.num_bits,
        )
        offset = first * self._block_size
        if (start - offset, stop - offset) != (0, tensor.shape[1]):
            tensor = tensor.regroup(group_size).take_columns(start - offset, stop - offset)
        return tensor if group_size == SMALLEST_GROUP else _padded(tensor)


def _padded(tensor: QuantizedTensor) -> QuantizedTensor:
    """In groups of 32, which the products need: each group of 16 is followed by the same 16 inputs once more.

    With values of zero there, these add nothing but the minimum, of which each half then has a half. Groups of 2, padded to 4:
        inputs 0 1 | 2 3    ->    0 1 0 1 | 2 3 2 3        values 5 6 | 7 8    ->    5 6 0 0 | 7 8 0 0
    """
    size, (num_rows, num_inputs) = tensor.group_size, tensor.shape
    groups = tensor.values.view(num_rows, -1, size)
    inputs = torch.arange(num_inputs).view(-1, size)
    return QuantizedTensor(
        values=torch.cat((groups, torch.zeros_like(groups)), dim=2).flatten(1),
        scales=tensor.scales,
        minima=None if tensor.minima is None else tensor.minima / 2,
        num_bits=tensor.num_bits,
        inputs=torch.cat((inputs, inputs), dim=1).flatten(),
    )
