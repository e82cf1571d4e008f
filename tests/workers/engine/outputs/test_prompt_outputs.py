"""Log-probabilities of a prompt and its embedding: transformers' values, and the same bits however the prompt was computed."""

import random

import numpy as np
import pytest
import torch
from support.checkpoints.tiny import make_tiny_model, write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine, make_request
from support.ranks.rank_threads import run_ranks

from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.execution.model_runner import PROMPT_LOGITS_AT_ONCE
from workers.engine.follower import run_follower
from workers.engine.llm_engine import stream_requests
from workers.protocol import FinishReason, GenerateRequest, SamplingParams

pytestmark = pytest.mark.usefixtures("both_ways")

TOLERANCE = 1e-4
WINDOW = 16


@pytest.fixture(scope="module", params=[WINDOW, None], ids=["window", "full"])
def checkpoint(request, tmp_path_factory):
    """(folder, transformers model) with and without a sliding window."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(folder, sliding_window=request.param)
    return folder, make_tiny_model(sliding_window=request.param)


def prompt_of(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(3, 256) for _ in range(length)]


def embed(name, prompt):
    return GenerateRequest(
        request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=0, seed=0), embed=True
    )


def first_deltas(core, requests):
    """By request id; later deltas must hold nothing of a prompt."""
    found = {}
    for delta in stream_requests(core, requests):
        if delta.request_id in found:
            assert delta.prompt_logprobs is None
            assert delta.embedding is None
        found.setdefault(delta.request_id, delta)
    return found


def logprobs_of(engine, prompt, **params):
    request = make_request("r", prompt, **({"max_tokens": 2, "prompt_logprobs": 3} | params))
    return first_deltas(engine.core, [request])["r"].prompt_logprobs


def expected_logprobs(reference, prompt):
    with torch.inference_mode():
        return reference(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)


def assert_like_reference(found, reference, prompt, *, start=0, num_top=3):
    expected = expected_logprobs(reference, prompt)
    assert len(found) == len(prompt) - start
    for position, entry in enumerate(found, start=start):
        if position == 0:
            assert entry is None
            continue
        row, token_id = expected[position - 1], prompt[position]
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=TOLERANCE)
        lowest, highest = (int((row > row[token_id] + t).sum()) + 1 for t in (TOLERANCE, -TOLERANCE))
        assert lowest <= entry.rank <= highest
        assert [p for _, p in entry.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=TOLERANCE)
        assert [row[i].item() for i, _ in entry.top] == pytest.approx([p for _, p in entry.top], abs=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 128], ids=["token by token", "7", "whole"])
def test_log_probabilities_equal_transformers(checkpoint, chunk):
    folder, reference = checkpoint
    engine = make_engine(folder, max_num_seqs=chunk, max_num_batched_tokens=chunk)
    for length in (1, 2, WINDOW + 1, 5 * WINDOW + 3):
        prompt = prompt_of(length, length)
        assert_like_reference(logprobs_of(engine, prompt), reference, prompt)
    prompt = prompt_of(50, 50)
    for start in (0, 1, 2, 30, 49):
        for num_top in (0, 5):
            found = logprobs_of(engine, prompt, prompt_logprobs=num_top, prompt_logprobs_start=start)
            assert_like_reference(found, reference, prompt, start=start, num_top=num_top)


def test_the_bits_do_not_depend_on_chunks_other_requests_caches_or_preemption(checkpoint):
    folder, _ = checkpoint
    prompts = {str(n): prompt_of(n, n) for n in (1, 2, 17, 60, 150)}
    requests = [
        make_request(name, p, max_tokens=30, seed=i, prompt_logprobs=i, prompt_logprobs_start=len(p) // 3)
        for i, (name, p) in enumerate(prompts.items())
    ]

    def run(engine):
        return {name: d.prompt_logprobs for name, d in first_deltas(engine.core, requests).items()}

    alone = make_engine(folder, max_num_batched_tokens=256, enable_prefix_caching=False)
    expected = {r.request_id: first_deltas(alone.core, [r])[r.request_id].prompt_logprobs for r in requests}
    assert PROMPT_LOGITS_AT_ONCE < 150
    assert {name: len(found) for name, found in expected.items()} == {
        n: len(p) - len(p) // 3 for n, p in prompts.items()
    }
    assert run(make_engine(folder, max_num_batched_tokens=512)) == expected, (
        "in one batch, in slices shared with others"
    )
    cached = make_engine(folder, max_num_batched_tokens=33)
    assert run(cached) == expected, "in chunks"
    before = cached.core.load().prefix_hits_total
    assert run(cached) == expected, "after a cached prefix"
    assert cached.core.load().prefix_hits_total > before
    tight = make_engine(
        folder, num_kv_blocks=cached.core.kv_cache.max_blocks_held(181, 32) + 6, max_num_batched_tokens=32
    )
    assert run(tight) == expected
    assert tight.core.load().num_preemptions_total > 0


def test_a_preempted_prompt_continues_where_its_log_probabilities_end(checkpoint):
    folder, reference = checkpoint
    engine = make_engine(folder, max_num_batched_tokens=32)
    core = engine.core
    prompt = prompt_of(100)
    for request in (make_request("r", prompt, prompt_logprobs=3, max_tokens=0), embed("e", prompt)):
        core.add_request(request)
        core.step()
        core.step()
        (running,) = core.scheduler.running
        assert running.num_computed_tokens == 64
        assert core.scheduler.preempt_last() is running
        (final,) = [d for _ in range(4) if core.has_work() for d in core.step()]
        assert not core.has_work()
        if final.prompt_logprobs is not None:
            assert_like_reference(final.prompt_logprobs, reference, prompt)
        else:
            assert embedding_of(final) == pytest.approx(expected_embedding(reference, prompt), abs=TOLERANCE)


def test_the_prefix_cache_serves_up_to_the_first_requested_token(checkpoint):
    folder, _ = checkpoint
    engine = make_engine(folder)  # blocks of 4
    prompt = prompt_of(40)
    engine.generate([make_request("warm", prompt, max_tokens=1)])
    for start, num_cached in ((0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (39, 36)):
        request = make_request("r", prompt, max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start)
        delta = first_deltas(engine.core, [request])["r"]
        assert delta.num_cached_tokens == num_cached, f"from token {start} on"
    assert first_deltas(engine.core, [embed("e", prompt)])["e"].num_cached_tokens == 0


def expected_embedding(reference, prompt):
    with torch.inference_mode():
        output = reference(torch.tensor([prompt]), output_hidden_states=True)
    return output.hidden_states[-1][0].double().mean(dim=0).tolist()


def embedding_of(delta):
    return np.frombuffer(delta.embedding, dtype="<f4").tolist()


@pytest.mark.parametrize("chunk", [1, 7, 128], ids=["token by token", "7", "whole"])
def test_embeddings_equal_transformers(checkpoint, chunk):
    folder, reference = checkpoint
    engine = make_engine(folder, max_num_seqs=chunk, max_num_batched_tokens=chunk)
    assert engine.core.facts("r").hidden_size == reference.config.hidden_size
    prompts = {str(n): prompt_of(n, n) for n in (1, 16, 83)}
    requests = [embed(name, prompt) for name, prompt in prompts.items()]
    requests.insert(1, make_request("other", prompt_of(20), max_tokens=3))
    for _ in ("cold", "warm"):
        found = first_deltas(engine.core, requests)
        for name, prompt in prompts.items():
            delta = found[name]
            assert (delta.finish_reason, delta.token_ids) == (FinishReason.LENGTH, [])
            assert embedding_of(delta) == pytest.approx(expected_embedding(reference, prompt), abs=TOLERANCE)
            assert found["other"].embedding is None
    assert not engine.core.has_work()
    assert engine.core.kv_cache.pool.num_used == 0


def test_a_request_without_output_tokens(checkpoint):
    folder, _ = checkpoint
    engine = make_engine(folder, max_model_len=64)
    deltas = list(engine.stream(make_request("r", prompt_of(64), max_tokens=0, prompt_logprobs=0)))
    assert [(d.finish_reason, d.token_ids, len(d.prompt_logprobs or ())) for d in deltas] == [
        (FinishReason.LENGTH, [], 64)
    ]
    assert engine.core.load().generated_tokens_total == 0
    assert engine.core.load().prompt_tokens_total == 64
    assert engine.core.kv_cache.pool.num_used == 0


def test_a_continued_request_does_not_compute_them_again(checkpoint):
    folder, _ = checkpoint
    request = make_request("r", prompt_of(9), prompt_logprobs=2, max_tokens=4)
    continued = GenerateRequest(
        request_id="r", prompt_token_ids=request.prompt_token_ids, sampling=request.sampling, output_token_ids=[7]
    )
    deltas = list(make_engine(folder).stream(continued))
    assert len(deltas) == 3
    assert all(d.prompt_logprobs is None for d in deltas)


@pytest.mark.group
def test_two_ranks_give_the_same(checkpoint):
    folder, reference = checkpoint
    prompt = prompt_of(150)
    requests = [make_request("r", prompt, max_tokens=2, prompt_logprobs=3, prompt_logprobs_start=4), embed("e", prompt)]

    def program(tp):
        config = make_config(folder, tensor_parallel_size=2, max_num_batched_tokens=200)
        runner = build_runner(config, tp)
        runner.allocate_kv_cache()
        if tp.rank:
            return run_follower(runner, tp)
        core = EngineCore(config, runner, tp)
        found = first_deltas(core, requests)
        core.shutdown()
        return found

    found, _ = run_ranks(2, program)
    assert_like_reference(found["r"].prompt_logprobs, reference, prompt, start=4)
    assert embedding_of(found["e"]) == pytest.approx(expected_embedding(reference, prompt), abs=TOLERANCE)
