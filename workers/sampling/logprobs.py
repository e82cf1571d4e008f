"""Log-probabilities of given tokens, and of the most likely ones, from the model's own logits.

A row's values depend on that row alone. Knows torch and TokenLogprob; no requests.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from workers.protocol import TokenLogprob


class LogprobTensors(NamedTuple):
    """Of n rows, on one device. `ranks`: 1 is the most likely token. The `top_` ones are [n, k], the most likely first."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, max_top: int) -> LogprobTensors:
    """Without a wait for the device. logits: [n, vocab_size] float32; token_ids: [n] int64; max_top: how many of the most likely
    tokens to find, at most vocab_size.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top_logprobs, top_ids = logprobs.topk(min(max_top, logits.shape[-1]), dim=-1)
    return LogprobTensors(token_ids, chosen.squeeze(1), ranks, top_ids, top_logprobs)


def list_logprobs(tensors: LogprobTensors, num_tops: Sequence[int]) -> list[TokenLogprob]:
    """One per row. tensors: on the CPU; num_tops: [n], how many of the most likely tokens to add."""
    columns = (t.tolist() for t in tensors)
    return [
        TokenLogprob(
            token_id=token_id, logprob=logprob, rank=rank, top=list(zip(row_ids[:n], row_logprobs[:n], strict=True))
        )
        for n, token_id, logprob, rank, row_ids, row_logprobs in zip(num_tops, *columns, strict=True)
    ]
