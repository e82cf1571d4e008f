"""A step that gives a request several tokens adds up to the same deltas as one token a step."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine, make_request
from support.paths import DEMO_MODEL

from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.llm_engine import stream_requests
from workers.engine.outputs.advance import advance, advance_plainly
from workers.engine.scheduling import request as engine_request
from workers.parallel.group import SingleRank
from workers.protocol import FinishReason, GenerateRequest, SamplingParams, TokenDelta, TokenLogprob
from workers.sampling.grammar import Constraint
from workers.sampling.sampler import Sampled
from workers.sampling.vocabulary import load_grammar_tokenizer

EOS = (2,)
TOKENIZER = load_grammar_tokenizer(DEMO_MODEL / "tokenizer.model.v3", vocab_size=4096, eos_token_ids=EOS)


def add_up(deltas: list[TokenDelta]) -> dict[str, TokenDelta]:
    """What a client has in the end: one delta per request."""
    total: dict[str, TokenDelta] = {}
    for delta in deltas:
        before = total.get(delta.request_id)
        if before is None:
            total[delta.request_id] = delta
            continue
        assert before.finish_reason is None, "nothing follows the end"
        logprobs = [*(before.logprobs or ()), *(delta.logprobs or ())]
        total[delta.request_id] = msgspec.structs.replace(
            delta,
            token_ids=before.token_ids + delta.token_ids,
            logprobs=logprobs or None,
            num_cached_tokens=before.num_cached_tokens,
            prompt_logprobs=before.prompt_logprobs,
        )
    return total


def new_request(params: dict[str, Any], grammar: str | None) -> engine_request.Request:
    sampling = SamplingParams(seed=0, grammar=grammar, **params)
    message = GenerateRequest(request_id="r", prompt_token_ids=[5, 6], sampling=sampling)
    request = engine_request.make_request(message, arrival=0, vocab_size=4096, max_model_len=20)
    request.num_cached_tokens = 0
    if grammar is not None:
        request.constraint = Constraint(TOKENIZER, grammar)
    return request


def run(request: engine_request.Request, sampled: list[Sampled], chunks: list[int]) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    for num_tokens in chunks:
        if not sampled or (deltas and deltas[-1].finish_reason is not None):
            break
        deltas += advance(request, sampled[:num_tokens], EOS)
        sampled = sampled[num_tokens:]
    return deltas


@settings(max_examples=300)
@given(
    token_ids=st.lists(st.one_of(st.integers(2, 12), st.sampled_from([613, None])), min_size=1, max_size=20),
    chunks=st.lists(st.integers(1, 6), min_size=20, max_size=20),
    params=st.fixed_dictionaries(
        {"max_tokens": st.integers(1, 25), "stop_token_ids": st.sampled_from([(), (7,), (9, 11)])},
        optional={"min_tokens": st.just(1), "logprobs": st.just(0)},
    ),
    grammar=st.sampled_from([None, None, 'start: "red"', "start: /[a-z]+/"]),
)
def test_several_tokens_at_once_are_as_one_at_a_time(token_ids, chunks, params, grammar):
    if grammar is not None:
        params.pop("min_tokens", None)
    sampled = [
        Sampled(t, TokenLogprob(token_id=t, logprob=-1.0, rank=1) if t is not None and "logprobs" in params else None)
        for t in token_ids
    ]
    one_by_one, at_once = new_request(params, grammar), new_request(params, grammar)
    expected = run(one_by_one, sampled, [1] * len(sampled))
    found = run(at_once, sampled, chunks)
    assert add_up(found) == add_up(expected)
    assert at_once.token_ids == one_by_one.token_ids, "tokens after the end are dropped"


def test_a_failure_after_other_tokens_of_the_step_is_a_delta_of_its_own():
    found = advance(
        new_request({"max_tokens": 9}, None),
        [Sampled(8, None), Sampled(None, None)],
        EOS,
    )
    assert [(d.token_ids, d.finish_reason) for d in found] == [([8], None), ([], FinishReason.ERROR)]


@pytest.mark.parametrize("num_at_once", [2, 3, 5])
@pytest.mark.parametrize("sliding_window", [16, None])
def test_an_engine_whose_sampler_gives_several_tokens(tmp_path, num_at_once, sliding_window):
    """The sampler knows the outputs beforehand and gives the next ones together, as a verified draft would."""
    folder = write_tiny_checkpoint(tmp_path, sliding_window=sliding_window)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
        {"logit_bias": {2: 5.0}, "ignore_eos": False},
        {"max_tokens": 7},
    ]
    requests = [make_request(str(i), list(range(3, 20 + i)), seed=i, **kind) for i, kind in enumerate(kinds)]
    plain = make_engine(folder)
    expected = add_up(list(plain.stream(*requests)))
    outputs = {tuple(r.prompt_token_ids): expected[r.request_id] for r in requests}

    def next_tokens(row):
        whole = outputs[tuple(row.token_ids[: row.num_prompt_tokens])]
        logprobs = whole.logprobs or [None] * len(whole.token_ids)
        tokens = [Sampled(t, p) for t, p in zip(whole.token_ids, logprobs, strict=True)]
        tokens.append(tokens[-1])  # after the end: the engine must drop it
        return tokens[row.position : row.position + num_at_once]

    config, tp = make_config(folder), SingleRank()
    runner = build_runner(config, tp)
    runner.allocate_kv_cache()
    core = EngineCore(config, runner, tp, sample_tokens=lambda logits, rows: [next_tokens(row) for row in rows])
    found = add_up(list(stream_requests(core, requests)))
    assert found == expected
    assert core.load().generated_tokens_total == plain.core.load().generated_tokens_total
    assert core.clock.num_steps_total < plain.core.clock.num_steps_total
    assert core.num_requests == core.kv_cache.pool.num_used == 0


@pytest.mark.parametrize("params", [{"max_tokens": 3}, {"max_tokens": 30, "stop_token_ids": (9,)}, {"max_tokens": 0}])
@pytest.mark.parametrize(
    "sampled", [[Sampled(8, None)], [Sampled(9, None)], [Sampled(2, None)], [Sampled(None, None)], []]
)
@pytest.mark.parametrize("num_before", [0, 1, 2, 17])
def test_a_request_that_goes_on_plainly_gets_the_delta_that_any_other_would(params, sampled, num_before):
    one, other = new_request(params, None), new_request(params, None)
    for request in (one, other):
        request.sequence.token_ids += [7] * num_before
        request.num_cached_tokens = None
    expected = advance(one, sampled, EOS)
    plain = advance_plainly(other, sampled, EOS)
    goes_on = len(expected) == len(sampled) == 1 and expected[0].finish_reason is None
    assert (plain is None) == (not goes_on)
    if plain is not None:
        assert [plain] == expected and other.token_ids == one.token_ids
    else:
        assert other.num_tokens == 2 + num_before, "without effect"
