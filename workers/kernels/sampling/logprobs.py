"""Log-probabilities of one token of each row, and of the row's most likely ones, in Triton. The specification is
`sample_specification.find_logprobs`: the same tokens and ranks, log-probabilities to a few units in the last place.

One program for each row. It reads the row twice, and once more for each of the most likely tokens.
"""

import torch
import triton
import triton.language as tl

# What a program reads at a time, and its warps: eight logits a thread. They fix the order of the sums.
BLOCK = 4096
NUM_WARPS = 16


@triton.jit
def next_largest(row_ptr, vocab_size, logit, token, BLOCK: tl.constexpr):
    """(logit, token) of the first that comes after the given one in the order of logits, the largest first, and equal ones by their ids."""
    # Each lane keeps the first of its own.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = tl.zeros((BLOCK,), tl.int32) + vocab_size
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        logits = tl.load(row_ptr + columns, mask=inside, other=float("-inf"))
        is_after = inside & ((logits < logit) | ((logits == logit) & (columns > token)))
        is_kept = is_after & ((logits > largest) | (ids == vocab_size))
        largest = tl.where(is_kept, logits, largest)
        ids = tl.where(is_kept, columns, ids)
    found = tl.max(largest)
    # A row of NaN has none.
    return found, tl.minimum(tl.min(tl.where(largest == found, ids, vocab_size)), vocab_size - 1)


@triton.jit(do_not_specialize=["num_top"])
def logprobs_kernel(
    logits_ptr,
    token_ids_ptr,
    rows_ptr,
    values_ptr,
    ids_ptr,
    vocab_size,
    num_top,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * (1 + num_top)
    ids_ptr += row * (2 + num_top)
    if HAS_ROWS:
        row = tl.load(rows_ptr + row)
    row_ptr = logits_ptr + row * vocab_size
    token = tl.load(token_ids_ptr + row)
    logit = tl.load(row_ptr + token)
    best, top_token = next_largest(row_ptr, vocab_size, float("inf"), -1, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    num_above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        sums += tl.exp(logits - best)
        num_above += (logits > logit).to(tl.int32)
    log_sum = tl.log(tl.sum(sums))
    tl.store(values_ptr, logit - best - log_sum)
    tl.store(ids_ptr, token.to(tl.int32))
    tl.store(ids_ptr + 1, tl.sum(num_above) + 1)
    top = best
    for i in range(num_top):
        if i > 0:
            top, top_token = next_largest(row_ptr, vocab_size, top, top_token, BLOCK)
        tl.store(values_ptr + 1 + i, top - best - log_sum)
        tl.store(ids_ptr + 2 + i, top_token)


def find_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, *, rows: torch.Tensor | None = None, max_top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See sample_specification.find_logprobs. logits: contiguous."""
    num_rows, vocab_size = len(logits) if rows is None else len(rows), logits.shape[1]
    num_top = min(max_top, vocab_size)
    values = torch.empty(num_rows, 1 + num_top, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, 2 + num_top, dtype=torch.int32, device=logits.device)
    logprobs_kernel[(num_rows,)](
        *(logits, token_ids, token_ids if rows is None else rows, values, ids, vocab_size, num_top),
        HAS_ROWS=rows is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return values, ids
