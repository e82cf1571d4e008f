"""Our fp32 logits against transformers' MistralForCausalLM on tiny random checkpoints, with the engine's scheduler, blocks and runner."""

import pytest
import torch
from support.checkpoints.tiny import make_tiny_model, write_tiny_checkpoint
from support.fakes.engines import make_engine, make_request
from support.logits import all_logits
from transformers import MistralForCausalLM

WINDOW = 16
TOLERANCE = 2e-4
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 5 * WINDOW + 3)


CHECKPOINTS = {
    "window": {"sliding_window": WINDOW},
    "full": {"sliding_window": None},
    "bfloat16": {"sliding_window": WINDOW, "dtype": torch.bfloat16},  # whose matrices have kernels of their own in fp32
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """(folder, transformers model in fp32) with and without a sliding window."""
    settings = CHECKPOINTS[request.param]
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), **settings)
    return folder, MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("chunk", [1, 7, WINDOW, 128], ids=["token by token", "7", "W", "whole"])
def test_logits_equal_transformers(checkpoint, chunk):
    folder, reference = checkpoint
    engine = make_engine(folder, max_num_seqs=chunk, max_num_batched_tokens=chunk, enable_prefix_caching=False)
    for length in LENGTHS:
        prompt = torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        difference = (all_logits(engine.core, prompt) - expected).abs().max().item()
        assert difference <= TOLERANCE, f"prompt of {length} tokens in chunks of {chunk}: off by {difference}"


def test_the_window_matters_in_this_comparison(checkpoint):
    """Guards the test above: a model that ignored the window would be far outside its tolerance."""
    _, reference = checkpoint
    if reference.config.sliding_window is None:
        pytest.skip("the model without a window")
    prompt = torch.randint(3, 256, (5 * WINDOW,), generator=torch.Generator().manual_seed(0)).tolist()
    full = make_tiny_model(sliding_window=None)
    with torch.inference_mode():
        difference = (full(torch.tensor([prompt])).logits - reference(torch.tensor([prompt])).logits).abs().max()
    assert difference > 100 * TOLERANCE


@pytest.mark.usefixtures("both_ways")
def test_greedy_generation_equals_transformers(checkpoint):
    folder, reference = checkpoint
    prompts = [torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 20, 40)]
    engine = make_engine(folder)
    ours = engine.generate([make_request(str(i), p, temperature=0.0, max_tokens=40) for i, p in enumerate(prompts)])
    for prompt, tokens in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens])).logits[0]
        for i, token in enumerate(tokens, start=len(prompt)):
            # A near tie may fall either way in floating point; anything else is a mistake.
            assert logits[i - 1].max() - logits[i - 1, token] <= TOLERANCE
