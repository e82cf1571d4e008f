"""The engine loop with a fake core: what is published, and which requests get an error when something fails."""

import queue
import threading

import pytest
from support.fakes.core import FakeCore, expected_tokens, request

from workers.engine.loop import EngineLoop
from workers.errors import GroupError
from workers.protocol import CacheEvents, FinishReason, GenerateRequest, SamplingParams, TokenDelta


class Published:
    """Collects deltas and cache events, and lets a test wait for a delta that ends a request."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        self.events: list[CacheEvents] = []

    def __call__(self, deltas: list[TokenDelta], events: CacheEvents | None) -> None:
        if events is not None:
            self.events.append(events)
        for delta in deltas:
            self.queue.put(delta)

    def until_finished(self, num_requests: int) -> dict[str, list[TokenDelta]]:
        seen: dict[str, list[TokenDelta]] = {}
        finished = 0
        while finished < num_requests:
            delta = self.queue.get(timeout=10)
            seen.setdefault(delta.request_id, []).append(delta)
            finished += delta.finish_reason is not None
        return seen


@pytest.fixture
def core():
    return FakeCore()


@pytest.fixture
def published():
    return Published()


@pytest.fixture
def loop(core, published):
    loop = EngineLoop(core, published, idle_heartbeat_s=0.02)
    loop.start()
    yield loop
    core.gate.set()
    assert loop.stop()


def test_runs_requests_to_their_end_and_shuts_the_core_down(core, published):
    loop = EngineLoop(core, published)
    loop.start()
    requests = [request(f"r{i}", max_tokens=3 + i, seed=10 * i) for i in range(5)]
    for r in requests:
        loop.submit(r)
    seen = published.until_finished(5)
    for r in requests:
        assert [t for d in seen[r.request_id] for t in d.token_ids] == expected_tokens(r)
    assert loop.stop()
    assert core.shut_down.is_set()
    assert loop.failure is None


def test_idle_means_heartbeats(core, loop):
    deadline = threading.Event()
    while core.num_heartbeats < 3 and not deadline.wait(0.01):
        pass
    assert core.num_steps == 0


def test_abort_reaches_the_core(core, loop, published):
    core.gate.clear()
    loop.submit(request("long", max_tokens=400))
    loop.submit(request("short", max_tokens=2))
    loop.abort("long")
    core.gate.set()
    seen = published.until_finished(1)
    assert "short" in seen
    assert core.aborted == ["long"]
    assert core.requests == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            GenerateRequest(request_id="bad", prompt_token_ids=[], sampling=SamplingParams(max_tokens=1, seed=0)),
            "empty",
        ),
        (request("bad", seed=666), "because of an internal error"),
    ],
    ids=["RequestError", "bug in add_request"],
)
def test_a_request_that_cannot_be_added_ends_alone(loop, published, bad, message):
    loop.submit(bad)
    loop.submit(request("good", max_tokens=2))
    seen = published.until_finished(2)
    assert seen["bad"][0].finish_reason is FinishReason.ERROR
    assert message in (seen["bad"][0].error or "")
    assert seen["good"][-1].finish_reason is FinishReason.LENGTH


def test_cache_events_travel_with_their_step(core, loop, published):
    core.gate.clear()
    events = [CacheEvents(stored=[b"a", b"b"]), CacheEvents(evicted=[b"a"], stored=[b"c"])]
    core.cache_events.extend(events)
    loop.submit(request("r", max_tokens=3))
    core.gate.set()
    published.until_finished(1)
    assert published.events == events


def test_a_step_without_tokens_still_publishes_what_it_stored(core, published, monkeypatch):
    """The first chunk of a long prompt fills blocks and generates nothing."""
    monkeypatch.setattr(core, "step", list)
    core.cache_events.append(CacheEvents(stored=[b"a"]))
    core.add_request(request("r"))
    loop = EngineLoop(core, published)
    loop.start()
    while not published.events:
        assert loop.failure is None, loop.failure
    assert loop.stop()
    assert published.queue.empty()


@pytest.mark.parametrize("failure", [RuntimeError("boom"), GroupError("rank 1 died")])
def test_an_exception_in_a_step_ends_the_loop_and_is_reported(core, published, failure):
    told: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    loop = EngineLoop(core, published, on_failure=told.put, idle_heartbeat_s=10)
    core.gate.clear()
    loop.start()
    loop.submit(request("a", max_tokens=10**9))
    loop.submit(request("b", max_tokens=10**9))
    core.gate.set()
    published.queue.get(timeout=10)  # it is running
    core.fail_with = failure
    assert told.get(timeout=10) is failure
    assert loop.failure is failure
    while not published.queue.empty():
        assert published.queue.get().finish_reason is None, (
            "another replica can go on with the requests: they must not end"
        )
    assert loop.stop()
