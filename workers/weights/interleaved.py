"""The row order of q and k in Mistral's own layout and in GGUF files, undone. Knows no files and no names."""

import torch

from workers.quant.method import Index, WeightSource
from workers.quant.quantized import StoredValues


class InterleavedRows:
    """A q or k weight, or its bias, whose rows are read in Hugging Face's order.

    Mistral and llama.cpp rotate adjacent pairs of a head's rows, Hugging Face pairs half a head apart. With head_dim 4:
        stored        a0 b0 a1 b1           rotates (a0, b0) and (a1, b1)
        Hugging Face  a0 a1 b0 b1           rotates the same two pairs
    Only whole heads can be read.
    """

    def __init__(self, source: WeightSource, head_dim: int) -> None:
        self.name = source.name
        self.shape = source.shape
        self._source = source
        self._head_dim = head_dim

    def __getitem__(self, index: Index) -> StoredValues:
        assert isinstance(index, slice), "only rows of q and k are divided"
        start, stop, _ = index.indices(self.shape[0])
        assert start % self._head_dim == 0 and stop % self._head_dim == 0, (start, stop, self._head_dim)
        rows = self._source[start:stop]
        half = self._head_dim // 2
        order = torch.arange(stop - start).view(-1, half, 2).transpose(1, 2).flatten()
        return rows[order] if isinstance(rows, torch.Tensor) else rows.take_rows(order)
