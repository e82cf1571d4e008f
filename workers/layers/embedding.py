"""Token embedding and output head, divided over the ranks by rows of the vocabulary.

The vocabulary is padded to a multiple of the number of ranks. A vocabulary of 10 over 4 ranks gives each 3 rows:

    rank      0        1        2        3
    tokens    0 1 2    3 4 5    6 7 8    9 - -        (- is padding: zero rows, whose logits are cut off)

Knows no checkpoint names and no files.
"""

import torch
from torch import nn
from torch.nn import functional

from workers.kernels.layers.layer_kernels import TORCH_LAYER_KERNELS, LayerKernels
from workers.parallel.group import TensorParallel
from workers.quant.dense import DENSE, get_matrix
from workers.quant.method import WeightMethod, WeightSource, check_shape, new_weight
from workers.quant.quantized import StoredValues, dense_values, pad_rows


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens it owns; the sum over ranks is the embedding. A plain table: rows are looked up, not multiplied."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        kernels: LayerKernels = TORCH_LAYER_KERNELS,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.kernels = kernels
        self.vocab_size = vocab_size
        self.weight = new_weight((_num_rows(vocab_size, tp), hidden_size), self.load_rows, dtype=dtype, device=device)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        # token_ids: [num_tokens], each in [0, vocab_size) -> [num_tokens, hidden_size], the same on all ranks
        if self.tp.size == 1:
            return functional.embedding(token_ids, self.weight)
        first = self.tp.rank * self.weight.shape[0]
        return self.tp.all_reduce(self.kernels.lookup_rows(self.weight, token_ids, first=first))

    def load_rows(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.vocab_size, self.weight.shape[1]))
        parameter.copy_(dense_values(_padded_rows(source, self.tp, num_rows=self.weight.shape[0])))
        return parameter.numel()


class ParallelLMHead(nn.Module):
    """Logits over the vocabulary, gathered on rank 0. `tied` is the embedding whose weight also serves as the head's.

    A tied embedding keeps its plain table, which looking up rows needs, and the head gets a copy in the method's form.
    """

    weight: nn.Parameter

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        tied: VocabParallelEmbedding | None = None,
        method: WeightMethod = DENSE,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.method = method
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        if tied is not None:
            self.weight = tied.weight
            return
        num_rows = _num_rows(vocab_size, tp)
        method.create(self, num_rows, hidden_size, weight_loader=self.load_rows, dtype=dtype, device=device)

    def forward(self, hidden_states: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor | None:
        # hidden_states: [num_tokens, hidden_size] -> [num_tokens, vocab_size] float32 on rank 0, None elsewhere
        # out: where the logits are computed if that saves a copy
        matrix = get_matrix(self)
        if self.tp.size == 1 and matrix is not None:
            wide = matrix.multiply_wide(hidden_states, out)
            if wide is not None:
                return wide
        logits = self.tp.gather(self.method.apply(self, hidden_states))
        return None if logits is None else logits[:, : self.vocab_size].float()

    def load_rows(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (self.vocab_size, self.hidden_size))
        num_rows = _num_rows(self.vocab_size, self.tp)
        return self.method.load(self, _padded_rows(source, self.tp, num_rows=num_rows), slice(None))

    def finish_loading(self) -> None:
        self.method.finish(self)


def _num_rows(vocab_size: int, tp: TensorParallel) -> int:
    return -(-vocab_size // tp.size)


def _padded_rows(source: WeightSource, tp: TensorParallel, *, num_rows: int) -> StoredValues:
    """This rank's rows of the vocabulary, then zero rows up to `num_rows`."""
    vocab_size = source.shape[0]
    start = min(tp.rank * num_rows, vocab_size)
    rows = source[start : min(start + num_rows, vocab_size)]
    return pad_rows(rows, num_rows)
