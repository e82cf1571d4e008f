"""A token's logits and log-probabilities are the same bits whatever else the step computes and however its context was computed.

That is what lets another replica take up a stream in the middle: it prefills what the first one decoded. Group tier where
two ranks take part; the ranks are threads.
"""

import random

import pytest
import torch
from support.fakes.engines import make_config, make_engine, make_request
from support.paths import DEMO_MODEL
from support.ranks.rank_threads import run_ranks
from support.tiny import write_tiny_checkpoint

from workers.engine import next_tokens
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.follower import run_follower
from workers.engine.llm_engine import stream_requests
from workers.protocol import GenerateRequest, SamplingParams
from workers.sampling.sampler import SamplingRow, sample

DEMO = DEMO_MODEL
NUM_OUTPUT = 12
PROMPT_LENS = (
    1,
    37,
    63,
    130,
    300,
)  # below, at and across the tiles of 64 keys, and past the demo model's window of 256
MODELS = {
    "window": {"sliding_window": 16},
    "wide window": {"sliding_window": 100, "num_key_value_heads": 2},
    "no window": {"sliding_window": None, "head_dim": 32},
    "one query head per KV head": {"sliding_window": None, "num_key_value_heads": 8},
}


def checkpoint(model, tmp_path):
    return DEMO if model == "demo" else write_tiny_checkpoint(tmp_path, **MODELS[model])


@pytest.fixture
def logits_of(monkeypatch):
    """{tokens so far: the logits that follow them}. A second run that meets the same context must find the same bits."""
    seen: dict[tuple[int, ...], torch.Tensor] = {}

    def recording(logits, rows, **kwargs):
        for row_logits, row in zip(logits, rows, strict=True):
            context = tuple(row.token_ids)
            expected = seen.setdefault(context, row_logits.clone())
            off = (row_logits - expected).abs().max().item()
            assert torch.equal(row_logits, expected), f"{off:.1e} off after {len(context)} tokens, {len(rows)} rows"
        return sample(logits, rows, **kwargs)

    monkeypatch.setattr(next_tokens, "sample", recording)
    return seen


def make_requests():
    rng = random.Random(0)
    kinds = [{"temperature": 0.0}, {"top_p": 0.9}, {"temperature": 0.7, "repetition_penalty": 1.1}]
    return [
        make_request(
            str(n), [rng.randrange(3, 256) for _ in range(n)], seed=n, max_tokens=NUM_OUTPUT, logprobs=5, **kind
        )
        for n, kind in zip(PROMPT_LENS, kinds * 2, strict=False)
    ]


def resumed(request, tokens):
    return GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        output_token_ids=tokens,
    )


def run(core, requests):
    """{request id: [(token, its log-probabilities), ...]}"""
    outputs = {r.request_id: [] for r in requests}
    for delta in stream_requests(core, requests):
        outputs[delta.request_id] += zip(delta.token_ids, delta.logprobs, strict=True)
    return outputs


def engine(folder, **overrides):
    settings = {"enable_prefix_caching": False, "max_num_batched_tokens": 512, "num_kv_blocks": 500}
    return make_engine(folder, **(settings | overrides)).core


def tokens_of(output):
    return [token for token, _ in output]


@pytest.mark.parametrize(("model", "num_threads"), [("demo", 1), ("demo", 2), *((model, 1) for model in MODELS)])
def test_every_way_to_compute_a_context_gives_the_same_bits(model, num_threads, tmp_path, logits_of):
    """`logits_of` compares the logits of every run with the first one's; here the log-probabilities are compared."""
    # Two threads on cores that others use as well wait for each other at every operation: only the long prompts then.
    folder, requests = checkpoint(model, tmp_path), make_requests()[0 if num_threads == 1 else 3 :]
    alone = engine(folder, num_threads=num_threads)
    expected: dict[str, list] = {}
    for request in requests:  # prefilled at once, then decoded one by one
        expected |= run(alone, [request])
    assert len(logits_of) == NUM_OUTPUT * len(requests), "every position was recorded"

    assert run(alone, requests) == expected, "decoded along with others"

    rng = random.Random(1)
    for budget, block_size in ((512, 16), (67, 1)):
        core = engine(
            folder,
            num_threads=num_threads,
            max_num_batched_tokens=budget,
            max_num_seqs=8,
            block_size=block_size,
            num_kv_blocks=8000 // block_size,
        )
        cuts = {r.request_id: rng.randrange(1, NUM_OUTPUT) for r in requests}
        continued = run(core, [resumed(r, tokens_of(expected[r.request_id])[: cuts[r.request_id]]) for r in requests])
        for name, output in continued.items():
            assert output == expected[name][cuts[name] :], f"prefilled in chunks of at most {budget} tokens"

    cached = engine(folder, num_threads=num_threads, enable_prefix_caching=True, num_kv_blocks=2000)
    assert run(cached, requests) == expected, "with prefix caching, cold"
    for cut in (1, NUM_OUTPUT - 1):
        continued = run(cached, [resumed(r, tokens_of(expected[r.request_id])[:cut]) for r in requests])
        assert continued == {name: output[cut:] for name, output in expected.items()}, "from a cached prefix"
    assert cached.load().prefix_hits_total > 0

    # Room for the longest request and little more.
    blocks = cached.kv_cache.max_blocks_held(PROMPT_LENS[-1] + NUM_OUTPUT, 64) + 12
    tight = engine(folder, num_threads=num_threads, num_kv_blocks=blocks, max_num_batched_tokens=64)
    assert run(tight, requests) == expected, "with blocks that come and go"


@pytest.mark.group
@pytest.mark.parametrize("model", ["demo", "window"])
def test_two_ranks_keep_the_promise_too(model, tmp_path, logits_of):
    folder, requests = checkpoint(model, tmp_path), make_requests()

    def program(tp):
        def make_core(**overrides):
            settings = {"enable_prefix_caching": False, "max_num_seqs": 8, "num_kv_blocks": 500}
            config = make_config(folder, tensor_parallel_size=2, **(settings | overrides))
            runner = build_runner(config, tp)
            runner.allocate_kv_cache()
            return EngineCore(config, runner, tp) if tp.rank == 0 else runner

        def on_both(core, requests):
            if tp.rank:
                return run_follower(core, tp)
            outputs = run(core, requests)
            core.shutdown()
            return outputs

        expected = on_both(make_core(max_num_batched_tokens=512), requests)
        parts = [resumed(r, tokens_of(expected[r.request_id])[:7]) for r in requests] if expected else []
        return expected, on_both(make_core(max_num_batched_tokens=29), parts)

    (expected, continued), _ = run_ranks(2, program)
    assert len(logits_of) >= NUM_OUTPUT * len(requests)
    assert continued == {name: output[7:] for name, output in expected.items()}


@pytest.mark.parametrize("vocab_size", [50, 4096, 32_768])
def test_a_rows_log_probabilities_do_not_depend_on_other_rows(vocab_size):
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    kinds = [
        {"temperature": 0.0, "logprobs": 5},
        {"logprobs": 0},
        {"top_p": 0.7, "temperature": 0.5, "logprobs": 20},
        {"top_k": 5, "min_p": 0.01},
        {"frequency_penalty": 0.5, "logprobs": 3},
    ]
    rows = [
        SamplingRow(SamplingParams(max_tokens=9, seed=i, **kinds[i % len(kinds)]), [5, 3, 3, 4], 2) for i in range(24)
    ]
    together = sample(logits.clone(), rows, eos_token_ids=(2,))
    alone = [sample(logits[i : i + 1].clone(), [row], eos_token_ids=(2,))[0] for i, row in enumerate(rows)]
    assert together == alone
