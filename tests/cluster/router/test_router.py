"""The router: choice, admission, accounting, health and reports."""

import asyncio
import contextlib
from typing import Any

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.router.admission.hashing import Hashing
from cluster.router.router import Availability, Router, Trace
from cluster.router.stream import Stream
from workers.errors import OverloadedError, ReplicaUnavailableError
from workers.protocol import CacheEvents, GenerateRequest, LoadReport, SamplingParams, hash_block, root_hash

PROMPT = list(range(1, 66))  # four blocks of 16 and a token


def request(name: str = "r", prompt: list[int] | None = None, *, adapter: str | None = None) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=4, seed=0)
    return GenerateRequest(request_id=name, prompt_token_ids=prompt or [1], sampling=sampling, adapter=adapter)


async def collect(
    router: Router, name: str = "r", prompt: list[int] | None = None, trace: Trace | None = None
) -> list[int]:
    return [i async for delta in router.generate(request(name, prompt), trace=trace) for i in delta.token_ids]


def idle(replica_id: str, **options: Any) -> FakeReplica:
    replica = FakeReplica(tokens([5, 6]), replica_id=replica_id, **options)
    replica.load = LoadReport(num_blocks=100, tokens_per_s=1000.0)
    return replica


def block_hashes(prompt: list[int], block_size: int = 16, *, adapter: str | None = None) -> list[bytes]:
    hashes: list[bytes] = []
    for i in range(0, len(prompt) - block_size + 1, block_size):
        hashes.append(hash_block(hashes[-1] if hashes else root_hash(adapter), prompt[i : i + block_size]))
    return hashes


# Choice


@pytest.mark.parametrize("policy", ["prefix", "least_load", "round_robin"])
async def test_requests_spread_over_ready_replicas(policy: Any) -> None:
    replicas = [idle(f"r{i}", hold_after=1) for i in range(3)]
    replicas[1].reason = "Replica r1 is waiting for rank 0, which does not answer."
    router = Router(replicas, policy=policy)
    running = [asyncio.create_task(collect(router, f"q{i}")) for i in range(4)]
    while len(replicas[0].requests) + len(replicas[2].requests) < 4:
        await asyncio.sleep(0)
    assert [len(r.requests) for r in replicas] == [2, 0, 2]
    assert router.num_inflight_requests == 4
    assert router.report("g", "u").streams_per_replica == {"r0": 2, "r1": 0, "r2": 2}
    for replica in replicas:
        replica.release.set()
    assert await asyncio.gather(*running) == [[5, 6]] * 4
    assert router.num_inflight_requests == 0


async def test_a_cached_prefix_attracts_its_requests() -> None:
    replicas = [idle(f"r{i}") for i in range(4)]
    router = Router(replicas)
    replicas[2].say(cache=CacheEvents(stored=block_hashes(PROMPT), reset=True))
    trace = Trace()
    for i in range(3):
        await collect(router, f"q{i}", PROMPT, trace)
    assert [len(r.requests) for r in replicas] == [0, 0, 3, 0]
    assert (trace.replica_id, trace.num_cached_tokens_predicted) == ("r2", 64)
    replicas[2].say(cache=CacheEvents(evicted=block_hashes(PROMPT)[:1]))
    replicas[1].say(cache=CacheEvents(stored=block_hashes(PROMPT)[:2]))
    await collect(router, "q", PROMPT)
    assert len(replicas[1].requests) == 1, "an evicted prefix attracts no request"


async def test_a_replica_that_was_removed_and_added_again_holds_nothing() -> None:
    replicas = [idle("r0"), idle("r1")]
    router = Router(replicas)
    replicas[1].say(cache=CacheEvents(stored=block_hashes(PROMPT), reset=True))
    router.update(replicas[:1], Availability())
    replicas[1].say(cache=CacheEvents(stored=block_hashes(PROMPT)))  # the router no longer listens
    router.update(replicas, Availability())
    explanation = await router.explain(PROMPT)
    assert [r.num_cached_tokens for r in explanation.replicas] == [0, 0]


async def test_a_prompt_counts_before_a_report_includes_it() -> None:
    """Two long prompts in one instant: the second must not go where the first has just gone."""
    replicas = [idle("r0", hold_after=0), idle("r1", hold_after=0)]
    router = Router(replicas)
    first = asyncio.create_task(collect(router, "q0", PROMPT))
    second = asyncio.create_task(collect(router, "q1", PROMPT))
    for replica in replicas:
        await replica.holding.wait()
        replica.release.set()
    await asyncio.gather(first, second)
    assert [len(r.requests) for r in replicas] == [1, 1]


async def test_hashes_are_shared_and_extended_and_omit_the_last_token() -> None:
    hashing = Hashing()
    prompt = list(range(16 * 600))
    first, second = (Stream(request(n, prompt), order=(0, 0)) for n in "ab")
    await asyncio.gather(hashing.extend(first, 16), hashing.extend(second, 16))
    assert first.block_hashes == second.block_hashes == block_hashes(prompt)[:-1], "the last token is always computed"
    first.output_token_ids = list(range(20))
    await hashing.extend(first, 16)
    assert first.block_hashes == block_hashes(prompt + first.output_token_ids)
    assert len(second.block_hashes) == 599


async def test_the_adapters_of_sequences_on_replicas_and_of_those_that_wait() -> None:
    replica = FakeReplica(tokens([5, 6]), max_num_seqs=1, hold_after=0)
    replica.load = LoadReport(num_blocks=100, tokens_per_s=1000.0)
    router = Router([replica])

    async def run(number: int, adapter: str | None) -> None:
        assert [_ async for _ in router.generate(request(f"r{number}", adapter=adapter))]

    # One more than the replica has room for at a time, so that its scheduler has a next one.
    tasks = [asyncio.create_task(run(i, adapter)) for i, adapter in enumerate(("law@1", None, "code@1", "law@2"))]
    async with asyncio.timeout(5):
        while router.num_waiting < 2:
            await asyncio.sleep(0)
    assert router.adapters() == ({"law@1"}, {"code@1", "law@2"})
    replica.release.set()
    await asyncio.gather(*tasks)
    assert router.adapters() == (set(), set())


async def test_two_adapters_share_no_prefix() -> None:
    """The same prompt has other keys and values under another adapter, so a replica's blocks count for one adapter only."""
    replicas = [idle(f"r{i}") for i in range(3)]
    router = Router(replicas)
    replicas[0].say(cache=CacheEvents(stored=block_hashes(PROMPT), reset=True))
    replicas[1].say(cache=CacheEvents(stored=block_hashes(PROMPT, adapter="law"), reset=True))
    replicas[2].say(cache=CacheEvents(stored=block_hashes(PROMPT, adapter="code"), reset=True))
    for adapter, replica_id in ((None, "r0"), ("law", "r1"), ("code", "r2")):
        trace = Trace()
        assert [_ async for _ in router.generate(request("q", PROMPT, adapter=adapter), trace=trace)]
        assert (trace.replica_id, trace.num_cached_tokens_predicted) == (replica_id, 64)
    trace = Trace()
    assert [_ async for _ in router.generate(request("q", PROMPT, adapter="other"), trace=trace)]
    assert trace.num_cached_tokens_predicted == 0


async def test_sequences_of_one_prompt_under_two_adapters_share_no_hashes() -> None:
    hashing = Hashing()
    base, law = (Stream(request("r", PROMPT, adapter=a), order=(0, 0)) for a in (None, "law"))
    for stream in (base, law):
        await hashing.extend(stream, 16)
    assert base.block_hashes == block_hashes(PROMPT)
    assert law.block_hashes == block_hashes(PROMPT, adapter="law")


async def test_the_replica_is_chosen_when_there_is_room() -> None:
    """A queued request goes where room appears first, not where the queue was shortest when it arrived."""
    replicas = [idle(f"r{i}", max_num_seqs=1, hold_after=1) for i in range(2)]
    router = Router(replicas)
    running = [asyncio.create_task(collect(router, f"q{i}")) for i in range(5)]
    while sum(len(r.requests) for r in replicas) < 4:
        await asyncio.sleep(0)
    assert [len(r.requests) for r in replicas] == [2, 2], "each has one running and one to come next"
    assert router.num_waiting == 1
    replicas[1].release.set()
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    while router.num_waiting:
        await asyncio.sleep(0)
    assert replicas[1].requests[-1].request_id == "q4"
    replicas[0].release.set()
    assert await asyncio.gather(*running) == [[5, 6]] * 5


async def test_room_reported_by_a_frame_is_used_at_once() -> None:
    replica = idle("r0", max_num_seqs=4)
    replica.load = LoadReport(num_running=4, num_waiting=4)  # of another gateway
    router = Router([replica])
    running = asyncio.create_task(collect(router))
    while not router.num_waiting:
        await asyncio.sleep(0)
    replica.say(num_waiting=0)
    assert router.num_waiting == 0
    assert await running == [5, 6]


# Admission


async def test_without_a_ready_replica_the_error_says_why() -> None:
    router = Router([FakeReplica(reason="Replica a is gone."), FakeReplica(reason="Replica b is gone.")])
    with pytest.raises(ReplicaUnavailableError, match=r"Replica a is gone\. Replica b is gone\."):
        await collect(router)
    with pytest.raises(ReplicaUnavailableError, match="has no replica"):
        await collect(Router([]))
    assert router.num_inflight_requests == 0


async def test_admission_is_all_or_nothing() -> None:
    router = Router([FakeReplica()], max_inflight_requests=3)
    with router.admit(2):
        with pytest.raises(OverloadedError, match="holds 2 of at most 3") as error, router.admit(2):
            raise AssertionError("there is room for one sequence only")
        assert error.value.retry_after_s > 0
        assert router.num_inflight_requests == 2
        assert await collect(router), "one more fits, and generate admits it"
        with router.admit(1), pytest.raises(OverloadedError):
            await collect(router)
    assert router.num_inflight_requests == 0


async def test_queued_tokens_are_bounded_and_the_refusal_says_when_to_retry() -> None:
    replica = idle("r0", max_num_seqs=1, hold_after=0)
    router = Router([replica], max_queued_tokens=100)
    running = [asyncio.create_task(collect(router, f"q{i}", PROMPT)) for i in range(3)]
    while router.num_waiting < 1:
        await asyncio.sleep(0)
    assert router.num_queued_tokens == 65
    replica.say(tokens_per_s=10.0, num_pending_tokens=135, num_running=1, num_waiting=1)
    with pytest.raises(OverloadedError, match=r"65 of at most 100 prompt tokens wait") as error, router.admit(1, 36):
        pass
    assert error.value.retry_after_s == 33, "135 on the replica, 130 just sent to it, 65 queued, at 10 tokens/s"
    replica.say(tokens_per_s=0.1)
    with pytest.raises(OverloadedError) as error, router.admit(1, 36):
        pass
    assert error.value.retry_after_s == 60
    with router.admit(1, 35):
        assert router.num_queued_tokens == 100
    replica.say(num_running=0, num_waiting=0)
    replica.release.set()
    await asyncio.gather(*running)
    assert router.num_queued_tokens == 0
    with router.admit(1, 1000):
        assert router.num_queued_tokens == 1000, "more than the limit fits an empty queue"
    assert router.num_queued_tokens == 0
    assert router.report("g", "u").arrived_tokens_total == 3 * 65 + 35 + 1000


async def test_closing_the_stream_aborts_and_frees_its_room() -> None:
    replica = FakeReplica(tokens([5, 6, 7]))
    router = Router([replica])
    async with contextlib.aclosing(router.generate(request())) as deltas:
        assert (await anext(deltas)).token_ids == [5]
        assert (replica.num_open, router.num_inflight_requests) == (1, 1)
    assert (replica.num_open, router.num_inflight_requests) == (0, 0)
    assert replica.aborted == ["r"]


async def test_shutting_down_admits_nothing_and_lets_running_requests_finish() -> None:
    replica = FakeReplica(tokens([5, 6]), hold_after=1)
    router = Router([replica])
    running = asyncio.create_task(collect(router))
    await replica.holding.wait()
    router.close("The server is shutting down.")
    assert not router.health().ready
    with pytest.raises(ReplicaUnavailableError, match="shutting down"):
        await collect(router, "late")
    replica.release.set()
    assert await running == [5, 6]


# Health and reports


async def test_health_of_a_cluster_without_replicas() -> None:
    router = Router()
    facts = FakeReplica().facts
    assert (router.health().ready, router.health().reason) == (False, "The server has no replica.")
    with pytest.raises(ReplicaUnavailableError, match="No replica has been reached"):
        _ = router.facts
    router.update([], Availability(expected=True, reason="Replica r0 is loading (40 %).", facts=facts))
    assert (router.health().ready, router.health().reason) == (False, "Replica r0 is loading (40 %).")
    assert router.facts == facts
    with router.admit(1, 10):
        pass
    router.update([], Availability(expected=True, scaled_to_zero=True, facts=facts))
    assert (router.health().ready, router.health().reason) == (True, "No replica runs; the next request starts one.")
    router.update([], Availability(reason="The weights are damaged."))
    with pytest.raises(ReplicaUnavailableError, match="The weights are damaged"), router.admit(1, 10):
        pass


async def test_the_report_contains_the_time_to_first_token() -> None:
    now = 100.0
    replica = idle("r0", hold_after=0)
    router = Router([replica], clock=lambda: now)
    assert router.report("g", "u").ttft_p95_s is None
    running = asyncio.create_task(collect(router))
    await replica.holding.wait()
    now += 2.5
    replica.release.set()
    await running
    report = router.report("g", "u")
    assert (report.gateway_id, report.url, report.ttft_p95_s) == ("g", "u", 2.5)
    now += 31.0
    assert router.report("g", "u").ttft_p95_s is None, "only the last 30 s count"


async def test_an_explanation_sends_nothing() -> None:
    replicas = [idle("r0"), idle("r1")]
    router = Router(replicas)
    replicas[1].say(cache=CacheEvents(stored=block_hashes(PROMPT)), num_pending_tokens=7)
    replicas[0].say(num_pending_tokens=0)
    explanation = await router.explain(PROMPT)
    assert (explanation.policy, explanation.chosen, explanation.num_prompt_tokens) == ("prefix", "r1", 65)
    assert [(r.replica_id, r.num_cached_tokens, r.pending_tokens, r.chosen) for r in explanation.replicas] == [
        ("r0", 0, 0.0, False),
        ("r1", 64, 7.0, True),
    ]
    assert "Replica r1 is expected to have the first token soonest" in explanation.reason
    assert "64 of the prompt's 65 tokens are cached there" in explanation.reason
    assert (await router.explain(PROMPT, policy="least_load")).policy == "least_load"
    for replica in replicas:
        replica.reason = "Away."
    assert (await router.explain(PROMPT)).chosen is None
    assert not replicas[0].requests + replicas[1].requests
