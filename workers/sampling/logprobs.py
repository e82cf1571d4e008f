"""Log-probabilities of given tokens, and of the most likely ones, from the model's own logits.

A row's values depend on that row alone. Knows torch and TokenLogprob; no requests.
"""

from collections.abc import Sequence

import torch

from workers.protocol import TokenLogprob


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_tops: Sequence[int]) -> list[TokenLogprob]:
    """One per row. logits: [n, vocab_size] float32; token_ids: [n]; num_tops: [n], how many of the most likely tokens to add."""
    logprobs = logits.log_softmax(dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen = logprobs.gather(1, ids)
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    most = min(max(num_tops), logits.shape[-1])
    top_logprobs, top_ids = logprobs.topk(most, dim=-1)
    columns = (chosen.squeeze(1).tolist(), ranks.tolist(), top_ids.tolist(), top_logprobs.tolist())
    return [
        TokenLogprob(
            token_id=token_id, logprob=logprob, rank=rank, top=list(zip(row_ids[:n], row_logprobs[:n], strict=True))
        )
        for token_id, n, logprob, rank, row_ids, row_logprobs in zip(token_ids, num_tops, *columns, strict=True)
    ]
