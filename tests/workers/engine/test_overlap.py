"""Overlap changes when tokens are read, and nothing else: the engine without it is the specification.

Random requests that end, stop, fail, are aborted and preempted in every way; and what only overlap can get wrong, one by one.
"""

import itertools
import queue
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine
from support.paths import DEMO_MODEL
from support.ranks.rank_threads import run_ranks

from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.execution.model_runner import ModelRunner
from workers.engine.follower import run_follower
from workers.engine.loop import EngineLoop
from workers.parallel.group import SingleRank, TensorParallel
from workers.protocol import BATCH_PRIORITY, FinishReason, GenerateRequest, SamplingParams, TokenDelta
from workers.sampling import masks
from workers.sampling.device_sampler import DeviceSampler
from workers.sampling.grammar import Grammars
from workers.sampling.masks import StepMasks

TOKENIZER = DEMO_MODEL / "tokenizer.model.v3"
SP = SentencePieceProcessor(model_file=str(TOKENIZER))
EOS = 2
NUM_BLOCKS = 60
MAX_MODEL_LEN = 48
GRAMMARS = ('start: "red" | "green" | "greenish"', r"start: /[0-9]{2,4}(-[a-f]{3}){1,3}/", "start: /[a-z]{4}/")


@pytest.fixture(scope="module")
def new_core(tmp_path_factory):
    """Engines that share one model for each block size, and one set of grammar threads."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=SP.vocab_size(), sliding_window=20)
    settings = {"num_kv_blocks": NUM_BLOCKS, "max_model_len": MAX_MODEL_LEN}
    runners = {n: build_runner(make_config(folder, block_size=n, **settings), SingleRank()) for n in (1, 4)}
    for runner in runners.values():
        runner.allocate_kv_cache()
    model = runners[4].config.model
    grammars = Grammars(str(TOKENIZER), vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)

    def new_core(**overrides: Any) -> EngineCore:
        config = make_config(folder, **(settings | overrides))
        runner = runners[config.block_size]
        runner.num_blocks = config.num_kv_blocks or 0
        core = EngineCore(config, runner, SingleRank())
        core.grammars = grammars
        # How long a step took must not decide who is part of the next one.
        core.scheduler.pace = None
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


SETTINGS = st.builds(
    lambda blocks, **more: {"num_kv_blocks": blocks[0], "block_size": blocks[1], **more},
    # Room for the longest sequence at least.
    st.sampled_from([(12, 4), (14, 4), (NUM_BLOCKS, 4), (50, 1)]),
    max_num_seqs=st.sampled_from([2, 4, 8]),
    max_num_batched_tokens=st.sampled_from([8, 24]),
    enable_prefix_caching=st.booleans(),
)


@settings(max_examples=20)
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


@settings(max_examples=30)
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


def plain_request(name: str, prompt: list[int], **params: Any) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**({"seed": 0} | params)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine does with the device, in order."""
    found: list[str] = []
    execute, sample = ModelRunner.execute, DeviceSampler.sample

    def recorded_execute(self: ModelRunner, *args: Any, **kwargs: Any) -> Any:
        found.append("launch")
        return execute(self, *args, **kwargs)

    def recorded_sample(self: DeviceSampler, *args: Any) -> Any:
        found.append("sample")
        pending = sample(self, *args)
        read = pending.read

        def recorded_read() -> Any:
            found.append("read")
            return read()

        pending.read = recorded_read
        return pending

    monkeypatch.setattr(ModelRunner, "execute", recorded_execute)
    monkeypatch.setattr(DeviceSampler, "sample", recorded_sample)
    return found


@pytest.mark.parametrize(
    ("params", "order"),
    [
        ({}, "launch sample launch sample read launch sample read read"),
        ({"repetition_penalty": 1.2, "logprobs": 1}, "launch sample launch sample read launch sample read read"),
        # What is sampled next depends on tokens that the host must know.
        ({"bad_words": ((5, 7),)}, "launch sample launch read sample launch read sample read"),
        ({"grammar": GRAMMARS[1]}, "launch sample launch read sample launch read sample read"),
    ],
    ids=["plain", "penalties", "bad words", "grammar"],
)
def test_a_step_is_launched_before_the_tokens_of_the_last_one_are_read(new_core, calls, params, order, monkeypatch):
    # On a busy machine no mask is late here.
    monkeypatch.setattr(masks, "MIN_WAIT_S", 20.0)
    monkeypatch.setattr(masks, "SLOW_MASK_S", 20.0)
    core = new_core(overlap=True)
    run(core, Plan([(0, plain_request("r", [3, 4], max_tokens=3, temperature=0.0, **params))]))
    assert " ".join(calls) == order


def test_a_token_after_the_end_leaves_nothing_in_the_prefix_cache(new_core):
    """The stop token would fill a block. The row that was launched for it must not count: the cache is the one without overlap."""
    prompt = [3, 4, 5, 6, 7]
    whole = run(new_core(), Plan([(0, plain_request("r", prompt, max_tokens=3, temperature=0.0))]))
    stop = whole[-1].token_ids[0]
    assert stop not in (whole[0].token_ids + whole[1].token_ids), (
        "it must be the third token, the eighth of the sequence"
    )
    request = plain_request("r", prompt, max_tokens=30, temperature=0.0, stop_token_ids=(stop,))
    plain, overlapped = new_core(overlap=False), new_core(overlap=True)
    assert run(overlapped, Plan([(0, request)])) == run(plain, Plan([(0, request)]))
    assert set(overlapped.kv_cache.pool.cached_hashes) == set(plain.kv_cache.pool.cached_hashes)
    assert len(overlapped.kv_cache.pool.cached_hashes) == 1
    assert overlapped.clock.num_steps_total == plain.clock.num_steps_total + 1, "the row was launched"


def test_an_id_can_be_used_again_while_a_token_of_its_former_request_is_in_flight(new_core):
    core = new_core(overlap=True)
    expected = run(core, Plan([(0, plain_request("r", [9, 8], max_tokens=4, temperature=0.0))]))
    core.add_request(plain_request("r", [3, 4, 5], max_tokens=9))
    core.step()
    core.abort("r")
    assert core.has_work(), "the step is still in flight"
    assert run(core, Plan([(0, plain_request("r", [9, 8], max_tokens=4, temperature=0.0))])) == expected


def test_a_request_preempted_with_a_token_in_flight_keeps_the_token(new_core):
    request = plain_request("r", [3, 4, 5], max_tokens=6, temperature=0.0)
    expected = [t for d in run(new_core(overlap=False), Plan([(0, request)])) for t in d.token_ids]
    core = new_core(overlap=True)
    for when in range(1, 7):
        core.add_request(request)
        deltas = [d for _ in range(when) for d in core.step()]
        if core.scheduler.running:
            assert core.scheduler.preempt_last().num_in_flight == 1
        while core.has_work():
            deltas += core.step()
        assert [t for d in deltas for t in d.token_ids] == expected, f"preempted after {when} steps"
    assert core.kv_cache.pool.num_used == 0


@pytest.mark.parametrize("slow_mask_s", [20.0, -1.0], ids=["not known to be slow", "known to be slow"])
def test_late_masks_change_no_token(new_core, monkeypatch, slow_mask_s):
    """Half of the masks are late: the request computes its last token again. One that is known to be slow is in no step while its token
    is in flight.
    """
    monkeypatch.setattr(masks, "SLOW_MASK_S", slow_mask_s)
    requests = [
        plain_request(str(i), [3, i], max_tokens=20, grammar=grammar, seed=i)
        for i, grammar in enumerate([*GRAMMARS, *GRAMMARS, None])
    ]
    plan = Plan([(0, request) for request in requests])
    expected = by_request(run(new_core(overlap=False), plan))
    take, rng = StepMasks.take, random.Random(0)

    def often_late(self: StepMasks) -> tuple[dict[str, Any], set[str]]:
        found, late = take(self)
        some = {name for name in found if rng.random() < 0.5}
        return {name: mask for name, mask in found.items() if name not in some}, late | some

    monkeypatch.setattr(StepMasks, "take", often_late)
    assert by_request(run(new_core(overlap=True), plan)) == expected
    assert by_request(run(new_core(overlap=True, num_kv_blocks=14), plan)) == expected, "with preemptions"


def test_health_does_not_run_ahead_of_the_device(new_core, monkeypatch):
    """The chunk of a prompt brings no token to read: that the device has computed it must be seen in another way."""
    core = new_core(overlap=True, max_num_seqs=4, max_num_batched_tokens=4)
    computed: list[int] = []
    num_launched = itertools.count()

    def mark() -> Callable[[], None]:
        n = next(num_launched)
        return lambda: computed.append(n)

    monkeypatch.setattr(core.runner, "mark", mark)
    core.add_request(plain_request("r", list(range(3, 17)), max_tokens=1))
    for n in range(3):
        assert core.step() == []
        assert computed == list(range(n))
        load = core.load()
        assert (load.num_steps_total, load.forward_age_s is None) == (n, n == 0)
        assert load.step_age_s is not None, "a step is in flight"
    assert core.step() == []
    assert core.load().num_running == 1, "its last token is in flight"
    assert len(core.step()) == 1
    load = core.load()
    assert (load.num_steps_total, load.num_running, load.step_age_s) == (4, 0, None)


def test_an_exception_while_reading_ends_no_request(new_core, monkeypatch):
    """The replica ends, and another one goes on with all its requests: what they got until then is the beginning of their outputs."""
    requests = [plain_request(str(i), [3, i], max_tokens=20, temperature=0.0) for i in range(3)]
    expected = by_request(run(new_core(overlap=False), Plan([(0, r) for r in requests])))
    published: list[TokenDelta] = []
    failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    loop = EngineLoop(new_core(overlap=True), lambda deltas, _: published.extend(deltas), on_failure=failures.put)
    reads, sample = itertools.count(), DeviceSampler.sample

    def failing(self: DeviceSampler, *args: Any) -> Any:
        pending = sample(self, *args)
        read = pending.read

        def fail_once() -> Any:
            if next(reads) == 5:
                raise RuntimeError("device error")
            return read()

        pending.read = fail_once
        return pending

    monkeypatch.setattr(DeviceSampler, "sample", failing)
    for request in requests:
        loop.submit(request)
    loop.start()
    assert str(failures.get(timeout=20)) == "device error"
    assert loop.stop()
    found = by_request(published)
    assert {name: len(deltas) for name, deltas in found.items()} == {"0": 5, "1": 5, "2": 5}
    for name, deltas in found.items():
        assert deltas == expected[name][:5]


def test_two_ranks_take_the_ids_from_rank_0(tmp_path):
    """Requests come and go, so that the rows of the tokens in flight change."""
    folder = write_tiny_checkpoint(tmp_path)
    requests = [plain_request(str(i), [3, 4 + i], max_tokens=3 + i % 4, seed=i, ignore_eos=True) for i in range(8)]
    plan = Plan([(i, request) for i, request in enumerate(requests)])

    def program(tp: TensorParallel) -> list[TokenDelta]:
        config = make_config(folder, tensor_parallel_size=2, max_num_seqs=4, overlap=True)
        runner = build_runner(config, tp)
        runner.allocate_kv_cache()
        if tp.rank:
            run_follower(runner, tp)
            return []
        core = EngineCore(config, runner, tp)
        deltas = run(core, plan)
        core.shutdown()
        return deltas

    found, _ = run_ranks(2, program)
    assert found == run(make_engine(folder, max_num_seqs=4).core, plan)
