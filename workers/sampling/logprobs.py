"""Log-probabilities of given tokens, and of the most likely ones, from the model's own logits.

A row's values depend on that row alone. Knows torch and TokenLogprob; no requests.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from workers.kernels.sampling.sampling_kernels import SamplingKernels, select_sampling_kernels
from workers.protocol import TokenLogprob


class LogprobTensors(NamedTuple):
    """Of n rows, on one device; see `sample_specification.find_logprobs`."""

    values: torch.Tensor
    ids: torch.Tensor


def compute_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    max_top: int,
    rows: torch.Tensor | None = None,
    kernels: SamplingKernels | None = None,
) -> LogprobTensors:
    """Without a wait for the device. logits: [n, vocab_size] float32, contiguous; token_ids: [n] int64; max_top: how many of the most
    likely tokens to find; rows: the rows that are wanted, [m] int64; None for all. kernels: None takes those of the device.
    """
    kernels = kernels or select_sampling_kernels(logits.device)
    return LogprobTensors(*kernels.find_logprobs(logits, token_ids, rows=rows, max_top=max_top))


def list_logprobs(tensors: LogprobTensors, num_tops: Sequence[int]) -> list[TokenLogprob]:
    """One per row. tensors: on the CPU; num_tops: [n], how many of the most likely tokens to add."""
    return [
        TokenLogprob(
            token_id=ids[0],
            logprob=values[0],
            rank=ids[1],
            top=list(zip(ids[2 : 2 + n], values[1 : 1 + n], strict=True)),
        )
        for n, values, ids in zip(num_tops, tensors.values.tolist(), tensors.ids.tolist(), strict=True)
    ]
