"""The engine as a whole, in one process: what a request gets does not depend on other requests, and nothing of it stays."""

import random

import pytest
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_engine, make_request

from workers.errors import RequestError
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.protocol import FinishReason

pytestmark = pytest.mark.usefixtures("both_ways")
WINDOW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), sliding_window=WINDOW)


@pytest.fixture(scope="module")
def full_attention_folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("full"), sliding_window=None)


def assert_empty(engine):
    core = engine.core
    assert not core.has_work()
    assert core.kv_cache.pool.num_used == 0
    assert core.num_requests == 0
    assert core.grammars.num_compiling == 0
    load = core.load()
    assert (load.num_running, load.num_waiting, load.num_used_blocks) == (0, 0, 0)


def prompt_of(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(3, 256) for _ in range(length)]


def mixed_requests(n):
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"top_k": 20, "repetition_penalty": 1.1},
        {"min_p": 0.02, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"logit_bias": {7: 2.0}, "logprobs": 2},
        {"min_tokens": 5, "ignore_eos": False},
    ]
    return [
        make_request(str(i), prompt_of(3 + 5 * i % 70, i), seed=i * 7919, max_tokens=30, **kinds[i % len(kinds)])
        for i in range(n)
    ]


@pytest.mark.parametrize("num_requests", [16, pytest.param(64, marks=pytest.mark.fuzz)])
def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(folder, num_requests):
    requests = mixed_requests(num_requests)
    alone = make_engine(folder, enable_prefix_caching=False)
    expected = [alone.generate([r])[0] for r in requests]

    assert make_engine(folder, enable_prefix_caching=False).generate(requests) == expected, "in one batch"

    cached = make_engine(folder, num_kv_blocks=2000)
    assert cached.generate(requests) == expected, "with prefix caching, cold"
    assert cached.generate(requests) == expected, "with prefix caching, warm"
    assert cached.core.load().prefix_hits_total > 0

    tight = make_engine(folder, num_kv_blocks=40, max_num_batched_tokens=32)
    assert tight.generate(requests) == expected, "with preemptions"
    assert tight.core.load().num_preemptions_total > 0
    for engine in (alone, cached, tight):
        assert_empty(engine)


def test_full_attention_keeps_the_same_promise(full_attention_folder):
    requests = mixed_requests(16)
    expected = [make_engine(full_attention_folder, enable_prefix_caching=False).generate([r])[0] for r in requests]
    tight = make_engine(full_attention_folder, num_kv_blocks=60)
    assert tight.generate(requests) == expected
    assert tight.core.load().num_preemptions_total > 0


def test_blocks_held_stop_growing_at_the_window(folder, both_ways):
    """20 windows of decoding hold no more than the window's blocks."""
    engine = make_engine(folder)
    bound = -(-(WINDOW - 1) // 4) + 1
    core = engine.core
    core.add_request(make_request("r", prompt_of(10), max_tokens=20 * WINDOW, temperature=0.0))
    held = []
    while core.has_work():
        core.step()
        held.append(core.kv_cache.pool.num_used)
    num_last = 1 if both_ways else 0  # with overlap, one more call reads the last token
    assert len(held) == 20 * WINDOW + num_last
    assert max(held) <= bound
    rest = held[2 * WINDOW : -1 - num_last]
    assert rest != []
    assert min(rest) >= bound - 1, "and it does hold the window"
    assert_empty(engine)


def test_without_a_window_blocks_grow_with_the_sequence(full_attention_folder):
    engine = make_engine(full_attention_folder)
    core = engine.core
    core.add_request(make_request("r", prompt_of(10), max_tokens=100))
    for _ in range(90):
        core.step()
    (request,) = core.scheduler.running
    assert len(request.sequence.block_ids) == -(-(request.num_tokens - 1) // 4)
    assert NULL_BLOCK not in request.sequence.block_ids


def test_a_request_can_be_continued_anywhere(folder):
    """A prompt and the tokens so far continue exactly: penalties, seeds and min_tokens count from the same place."""
    first, second = (make_engine(folder, enable_prefix_caching=False) for _ in range(2))
    for request in mixed_requests(7):
        whole = first.generate([request])[0]
        for cut in (1, 7, len(whole) - 1):
            resumed = type(request)(
                request_id="resumed",
                prompt_token_ids=request.prompt_token_ids,
                sampling=request.sampling,
                output_token_ids=whole[:cut],
            )
            assert second.generate([resumed])[0] == whole[cut:]


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_abort_at_any_stage_frees_everything(folder, when):
    engine = make_engine(folder, max_num_seqs=2, max_num_batched_tokens=8)
    core = engine.core
    core.add_request(make_request("a", prompt_of(30), max_tokens=50))
    core.add_request(make_request("b", prompt_of(5), max_tokens=5))
    steps = {"waiting": 0, "prefilling": 2, "decoding": 20}[when]
    for _ in range(steps):
        core.step()
    core.abort("a")
    core.abort("a")
    core.abort("never seen")
    deltas = []
    while core.has_work():
        deltas += core.step()
    assert {d.request_id for d in deltas} <= {"b"}
    assert_empty(engine)


def test_finish_reasons(folder):
    engine = make_engine(folder, max_model_len=64)
    by_length = list(engine.stream(make_request("a", prompt_of(5), max_tokens=3)))
    assert by_length[-1].finish_reason is FinishReason.LENGTH
    assert sum(len(d.token_ids) for d in by_length) == 3

    by_context = list(engine.stream(make_request("b", prompt_of(60), max_tokens=100)))
    assert by_context[-1].finish_reason is FinishReason.LENGTH
    assert len(by_context) == 4, "64 tokens of context leave 4 after a prompt of 60"

    token = by_length[0].token_ids[0]
    by_stop = list(engine.stream(make_request("c", prompt_of(5), max_tokens=9, stop_token_ids=(token,))))
    assert by_stop[-1].finish_reason is FinishReason.STOP
    assert by_stop[-1].stop_token_id == token
    assert by_stop[-1].token_ids == [token]
    assert_empty(engine)


def test_eos_stops_unless_ignored_or_too_early(folder):
    engine = make_engine(folder)

    def length(**params):
        request = make_request("r", prompt_of(5), logit_bias={2: 100.0}, max_tokens=8, **params)
        return len(engine.generate([request])[0])

    assert length(ignore_eos=False) == 1
    assert length(ignore_eos=True) == 8
    assert length(ignore_eos=False, min_tokens=4) == 5


def test_a_request_refused_on_arrival_leaves_nothing(folder):
    engine = make_engine(folder)
    for prompt, params in (([], {}), ([5], {"temperature": -0.1}), ([5], {"grammar": "start: x", "ignore_eos": False})):
        with pytest.raises(RequestError):
            engine.core.add_request(make_request("r", prompt, **params))
        assert_empty(engine)


def test_strange_but_legal_requests_run(folder):
    engine = make_engine(folder)
    everything = tuple(range(256))
    requests = [
        make_request("all tokens biased", [5], logit_bias=dict.fromkeys(everything, -100.0)),
        make_request("hot", [5], temperature=100.0),
        make_request("cold", [5], temperature=1e-30),
        make_request("strong", [5], repetition_penalty=100.0, frequency_penalty=100.0, presence_penalty=-100.0),
        make_request("seed", [5], seed=-(2**63)),
        make_request("huge top_k", [5], top_k=10**9),
        make_request("greedy logprobs", [5], temperature=0.0, logprobs=100),
        make_request("long limit", [5] * 500, max_tokens=10**12),
    ]
    outputs = engine.generate(requests)
    assert all(outputs)
    assert_empty(engine)


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 3, "stop_token_ids": tuple(range(256))},
        {"bad_words": tuple((i,) for i in range(256))},
        {"allowed_token_ids": (7, 9), "bad_words": ((7,), (9,))},
    ],
    ids=["all tokens stop too early", "all are bad", "all that are allowed are bad"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_bans_every_token_ends_alone(folder, params, temperature):
    engine = make_engine(folder)
    core = engine.core
    core.add_request(make_request("r", [5], temperature=temperature, max_tokens=5, logprobs=1, **params))
    core.add_request(make_request("other", [6], max_tokens=3))
    deltas = []
    while core.has_work():
        deltas += core.step()
    (failed,) = [d for d in deltas if d.request_id == "r"]
    assert (failed.finish_reason, failed.token_ids) == (FinishReason.ERROR, [])
    assert failed.error is not None and "banned" in failed.error
    assert sum(len(d.token_ids) for d in deltas) == 3, "the other one goes on"
    assert_empty(engine)


def test_a_cache_too_small_for_the_context_shortens_it_and_says_so(full_attention_folder, caplog):
    engine = make_engine(full_attention_folder, num_kv_blocks=10)
    assert engine.core.max_model_len == 40
    assert "holds one sequence of 40 tokens" in caplog.text
    with pytest.raises(RequestError, match="context holds 40 tokens"):
        engine.core.add_request(make_request("r", [5] * 40))
    assert len(engine.generate([make_request("r", [5] * 39)])[0]) == 1


def test_a_window_lets_a_small_cache_hold_a_long_context(folder):
    """A window of 16 in chunks of 8 needs 7 blocks of 4, however long the sequence."""
    engine = make_engine(folder, num_kv_blocks=7, max_num_batched_tokens=8, max_num_seqs=8)
    assert engine.core.max_model_len == 512
    assert len(engine.generate([make_request("r", prompt_of(200), max_tokens=200)])[0]) == 200
    assert_empty(engine)


def test_two_requests_with_one_id_are_refused(folder):
    engine = make_engine(folder)
    with pytest.raises(RequestError, match="share one request_id"):
        engine.generate([make_request("r", [5]), make_request("r", [6])])


def test_heartbeat_computes_and_leaves_the_cache_alone(folder):
    engine = make_engine(folder)
    assert engine.core.load().forward_age_s is None
    engine.core.heartbeat()
    assert engine.core.load().forward_age_s is not None
    assert_empty(engine)
    expected = make_engine(folder).generate([make_request("r", prompt_of(20), temperature=0.0)])
    core = engine.core
    core.add_request(make_request("r", prompt_of(20), temperature=0.0))
    tokens = []
    while core.has_work():
        tokens += [t for d in core.step() for t in d.token_ids]
        core.heartbeat()
    assert [tokens] == expected
