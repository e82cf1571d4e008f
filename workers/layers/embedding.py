"""Token embedding and output head, divided over the ranks by rows of the vocabulary.

The vocabulary is padded to a multiple of the number of ranks. A vocabulary of 10 over 4 ranks gives each 3 rows:

    rank      0        1        2        3
    tokens    0 1 2    3 4 5    6 7 8    9 - -        (- is padding: zero rows, whose logits are cut off)

Knows no checkpoint names and no files.
"""

import torch
from torch import nn
from torch.nn import functional

from workers.layers.linear import WeightSource, check_shape, linear, new_weight, pack
from workers.parallel.group import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens it owns; the sum over ranks is the embedding."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, tp: TensorParallel, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.tp = tp
        self.weight = _vocab_rows(vocab_size, hidden_size, tp=tp, dtype=dtype, device=device)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        # token_ids: [num_tokens], each in [0, vocab_size) -> [num_tokens, hidden_size], the same on all ranks
        if self.tp.size == 1:
            return functional.embedding(token_ids, self.weight)
        num_rows = self.weight.shape[0]
        rows = token_ids - self.tp.rank * num_rows
        not_mine = (rows < 0) | (rows >= num_rows)
        embedded = functional.embedding(rows.masked_fill(not_mine, 0), self.weight)
        return self.tp.all_reduce(embedded.masked_fill_(not_mine.unsqueeze(-1), 0))


class ParallelLMHead(nn.Module):
    """Logits over the vocabulary, gathered on rank 0. `tied` is the embedding whose weight also serves as the head's."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        tied: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.weight = tied.weight if tied else _vocab_rows(vocab_size, hidden_size, tp=tp, dtype=dtype, device=device)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        # hidden_states: [num_tokens, hidden_size] -> [num_tokens, vocab_size] on rank 0, None elsewhere
        logits = self.tp.gather(linear(hidden_states, self.weight))
        return None if logits is None else logits[:, : self.vocab_size]

    def pack(self) -> None:
        """A tied embedding keeps its plain weight, which looking up rows needs, and the head gets a packed copy."""
        self.weight = pack(self.weight)


def _vocab_rows(
    vocab_size: int, hidden_size: int, *, tp: TensorParallel, dtype: torch.dtype, device: torch.device | str
) -> nn.Parameter:
    num_rows = -(-vocab_size // tp.size)
    start = min(tp.rank * num_rows, vocab_size)
    stop = min(start + num_rows, vocab_size)

    def load_rows(parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        check_shape(source, (vocab_size, hidden_size))
        parameter[: stop - start].copy_(source[start:stop])
        parameter[stop - start :].zero_()
        return parameter.numel()

    return new_weight((num_rows, hidden_size), load_rows, dtype=dtype, device=device)
