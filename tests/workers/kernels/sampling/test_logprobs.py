"""The kernel of log-probabilities against its specification: the same tokens and ranks, and nearly the same values."""

import pytest
import torch

from workers.kernels.sampling import logprobs as kernel
from workers.kernels.sampling import sample_specification as specification


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 64)


def logits_of(num_rows, vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    return torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(num_rows)]) * 0.05 - 3


@pytest.mark.parametrize("vocab_size", [1, 7, 64, 150])
@pytest.mark.parametrize("rows", [None, [3, 0, 4]])
def test_the_kernel_gives_what_the_specification_gives(vocab_size, rows):
    logits = logits_of(5, vocab_size)
    token_ids = torch.tensor([0, 1, 63, 149, 5]) % vocab_size
    index = None if rows is None else torch.tensor(rows)
    for max_top in (0, 5, 200 if vocab_size < 10 else 1):
        values, ids = kernel.find_logprobs(logits, token_ids, rows=index, max_top=max_top)
        expected, expected_ids = specification.find_logprobs(logits, token_ids, rows=index, max_top=max_top)
        assert ids.shape == (3 if rows else 5, 2 + min(max_top, vocab_size))
        assert torch.equal(ids, expected_ids), f"{max_top} of {vocab_size}"
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


def test_equal_logits_come_in_the_order_of_their_ids():
    """Infinite ones too. The rank counts those above, so equal tokens have equal ranks."""
    logits = torch.full((1, 150), -torch.inf)
    logits[0, [140, 9, 70, 71]] = torch.tensor([1.0, 2.0, 1.0, 1.0])
    values, ids = kernel.find_logprobs(logits, torch.tensor([140]), max_top=6)
    assert ids.tolist() == [[140, 2, 9, 70, 71, 140, 0, 1]]
    assert values[0, 5:].tolist() == [-torch.inf] * 2
    assert values[0, 0] == values[0, 2] == values[0, 4]


def test_which_tokens_are_the_most_likely_does_not_depend_on_how_many_are_asked_for():
    """Another row may ask for more. Logits in bfloat16 are often equal."""
    logits = torch.randn(8, 700, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    expected = logits.argsort(dim=-1, descending=True, stable=True)
    for max_top in (1, 3, 5, 20, 100):
        _, ids = specification.find_logprobs(logits, torch.zeros(8, dtype=torch.int64), max_top=max_top)
        assert torch.equal(ids[:, 2:], expected[:, :max_top].to(torch.int32)), max_top


def test_a_row_does_not_depend_on_others():
    logits, token_ids = torch.randn(6, 150, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    together = kernel.find_logprobs(logits, token_ids, max_top=3)
    for i in range(6):
        alone = kernel.find_logprobs(logits[i : i + 1], token_ids[i : i + 1], max_top=3)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_row_of_nan_ends():
    """It has no token. What is said of it is not read, but an id must be one."""
    _, ids = kernel.find_logprobs(torch.full((1, 70), torch.nan), torch.tensor([0]), max_top=3)
    assert ids.max() < 70
