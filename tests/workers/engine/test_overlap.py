"""Overlap changes when tokens are read, and nothing else: the engine without it is the specification.

Random requests that end, stop, fail, are aborted and preempted in every way; and what only overlap can get wrong, one by one.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from support.fakes.engines import make_config
from support.paths import DEMO_MODEL
from support.tiny import write_tiny_checkpoint

from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.parallel.group import SingleRank
from workers.protocol import BATCH_PRIORITY, FinishReason, GenerateRequest, SamplingParams, TokenDelta
from workers.sampling.grammar import Grammars

TOKENIZER = DEMO_MODEL / "tokenizer.model.v3"
SP = SentencePieceProcessor(model_file=str(TOKENIZER))
EOS = 2
NUM_BLOCKS = 60
MAX_MODEL_LEN = 48
GRAMMARS = ('start: "red" | "green" | "greenish"', r"start: /[0-9]{2,4}(-[a-f]{3}){1,3}/", "start: /[a-z]{4}/")


@pytest.fixture(scope="module")
def new_core(tmp_path_factory):
    """Engines that share one model and one set of grammar threads."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=SP.vocab_size(), sliding_window=20)
    base = make_config(folder, num_kv_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN)
    runner = build_runner(base, SingleRank())
    runner.allocate_kv_cache()
    grammars = Grammars(str(TOKENIZER), vocab_size=base.model.vocab_size, eos_token_ids=base.model.eos_token_ids)

    def new_core(**overrides: Any) -> EngineCore:
        runner.num_blocks = overrides.get("num_kv_blocks", NUM_BLOCKS)
        core = EngineCore(make_config(folder, **({"max_model_len": MAX_MODEL_LEN} | overrides)), runner, SingleRank())
        core.grammars = grammars
        return core

    yield new_core
    grammars.close()


@dataclass
class Plan:
    """Requests with the number of steps before each arrives, and the number of steps before some are aborted."""

    requests: list[tuple[int, GenerateRequest]]
    aborts: dict[str, int] = field(default_factory=dict)


def run(core: EngineCore, plan: Plan) -> list[TokenDelta]:
    """All deltas. The engine is empty afterwards."""
    deltas: list[TokenDelta] = []
    step, generated_before = 0, core.load().generated_tokens_total
    last = max([when for when, _ in plan.requests] + list(plan.aborts.values()))
    while step <= last or core.has_work():
        for when, request in plan.requests:
            if when == step:
                core.add_request(request)
        for name, when in plan.aborts.items():
            if when == step:
                core.abort(name)
        deltas += core.step()
        step += 1
        assert step < 5000, "the engine does not get to the end"
    assert core.num_requests == core.kv_cache.pool.num_used == core.grammars.num_compiling == 0
    load = core.load()
    assert (load.num_running, load.num_waiting, load.step_age_s) == (0, 0, None)
    assert load.generated_tokens_total - generated_before == sum(len(d.token_ids) for d in deltas)
    return deltas


def by_request(deltas: list[TokenDelta]) -> dict[str, list[TokenDelta]]:
    """When a request starts depends on when others end, and so does what it finds in the cache."""
    found: dict[str, list[TokenDelta]] = {}
    for delta in deltas:
        found.setdefault(delta.request_id, []).append(msgspec.structs.replace(delta, num_cached_tokens=None))
    return found


TOKENS = st.integers(3, 30)  # few, so that prefixes repeat
SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 14), "seed": st.integers(0, 5), "temperature": st.sampled_from([0.0, 0.8, 1.5])},
    optional={
        "top_p": st.just(0.9),
        "repetition_penalty": st.just(1.3),
        "presence_penalty": st.just(0.7),
        "frequency_penalty": st.just(0.4),
        "min_tokens": st.just(1),
        "logprobs": st.integers(0, 2),
        "prompt_logprobs": st.just(1),
        "allowed_token_ids": st.just((3, 5, 7)),
        # The last one leaves no token to choose among the allowed ones.
        "bad_words": st.sampled_from([((7,),), ((5, 7), (3, 3, 5), (11,)), ((3,), (5,), (7,))]),
    },
)
STOPS = st.fixed_dictionaries(
    {},
    optional={
        "allowed_token_ids": st.just((2, 3, 5, 7)),
        "stop_token_ids": st.sampled_from([(3,), (7, 11)]),
        "logit_bias": st.just({EOS: 7.0}),
    },
)


@st.composite
def plans(draw: st.DrawFn, *, stops: bool, grammars: bool) -> Plan:
    requests = []
    for i in range(draw(st.integers(1, 8))):
        prompt = draw(st.lists(TOKENS, min_size=1, max_size=20))
        params: dict[str, Any] = draw(SAMPLING)
        kind = draw(st.sampled_from(["plain"] * 4 + ["no tokens", "embedding", "continued"] + ["grammar"] * grammars))
        more: dict[str, Any] = {"priority": draw(st.sampled_from([0, 0, 1, BATCH_PRIORITY]))}
        params = {"ignore_eos": not stops} | params | (draw(STOPS) if stops else {})
        if kind in ("no tokens", "embedding"):
            params |= {"max_tokens": 0, "min_tokens": 0}
            more["embed"] = kind == "embedding"
            if more["embed"]:
                params.pop("prompt_logprobs", None)
        if kind == "continued" and params["max_tokens"] > 2:
            more["output_token_ids"] = draw(st.lists(TOKENS, min_size=1, max_size=2))
        if kind == "grammar":
            for name in ("ignore_eos", "min_tokens", "bad_words", "allowed_token_ids", "stop_token_ids"):
                params.pop(name, None)
            params["grammar"] = '%llguidance {"no_forcing": true}\n' + draw(st.sampled_from(GRAMMARS))
        sampling = SamplingParams(**params)
        request = GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, **more)
        requests.append((draw(st.integers(0, 12)), request))
    names = [request.request_id for _, request in requests]
    aborted = draw(st.lists(st.sampled_from(names), unique=True, max_size=2))
    return Plan(requests, {name: draw(st.integers(0, 25)) for name in aborted})


SETTINGS = st.fixed_dictionaries(
    {
        # 12 blocks of 4 hold the longest sequence.
        "num_kv_blocks": st.sampled_from([12, 14, NUM_BLOCKS]),
        "max_num_seqs": st.sampled_from([2, 4, 8]),
        "max_num_batched_tokens": st.sampled_from([8, 24]),
        "enable_prefix_caching": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(plan=plans(stops=False, grammars=False), options=SETTINGS)
def test_when_all_ends_are_known_in_advance_every_step_is_the_same(new_core, plan, options):
    """Not a row is launched for nothing: the same deltas in the same order, with the same prefixes found and the same preemptions."""
    plain, overlapped = new_core(**options, overlap=False), new_core(**options, overlap=True)
    expected, found = run(plain, plan), run(overlapped, plan)
    fails = any(d.finish_reason is FinishReason.ERROR for d in expected)
    if plan.aborts or fails:
        compare(expected, found, plan)
    else:
        assert found == expected
        assert overlapped.load().num_preemptions_total == plain.load().num_preemptions_total
    assert overlapped.take_cache_events() == plain.take_cache_events() or fails


@settings(max_examples=40, deadline=None)
@given(plan=plans(stops=True, grammars=True), options=SETTINGS)
def test_random_requests_get_the_same_deltas(new_core, plan, options):
    plain, overlapped = new_core(**options, overlap=False), new_core(**options, overlap=True)
    expected = run(plain, plan)
    compare(expected, run(overlapped, plan), plan)
    compare(expected, run(overlapped, plan), plan)  # with what the first run left in the prefix cache


def compare(expected: list[TokenDelta], found: list[TokenDelta], plan: Plan) -> None:
    wanted, got = by_request(expected), by_request(found)
    for _, request in plan.requests:
        name = request.request_id
        ours, theirs = got.get(name, []), wanted.get(name, [])
        if name in plan.aborts:
            n = min(len(ours), len(theirs))
            ours, theirs = ours[:n], theirs[:n]
        assert ours == theirs, f"request {name}"
