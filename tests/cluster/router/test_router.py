"""The router: choice, admission, accounting, health and what it reports."""

import asyncio
import contextlib
from typing import Any

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.router.hashing import Hashing
from cluster.router.router import Outlook, Router, Trace
from cluster.router.stream import Stream
from workers.errors import OverloadedError, ReplicaUnavailableError
from workers.protocol import CacheEvents, GenerateRequest, LoadReport, SamplingParams, hash_block

PROMPT = list(range(1, 66))  # four blocks of 16 and a token


def request(name: str = "r", prompt: list[int] | None = None) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt_token_ids=prompt or [1], sampling=SamplingParams(max_tokens=4, seed=0)
    )


async def collect(
    router: Router, name: str = "r", prompt: list[int] | None = None, trace: Trace | None = None
) -> list[int]:
    return [i async for delta in router.generate(request(name, prompt), trace=trace) for i in delta.token_ids]


def idle(replica_id: str, **options: Any) -> FakeReplica:
    replica = FakeReplica(tokens([5, 6]), replica_id=replica_id, **options)
    replica.load = LoadReport(num_blocks=100, tokens_per_s=1000.0)
    return replica


def block_hashes(prompt: list[int], block_size: int = 16) -> list[bytes]:
    hashes: list[bytes] = []
    for i in range(0, len(prompt) - block_size + 1, block_size):
        hashes.append(hash_block(hashes[-1] if hashes else b"", prompt[i : i + block_size]))
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


async def test_a_cached_prefix_draws_its_requests() -> None:
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
    assert len(replicas[1].requests) == 1, "what was evicted draws nobody"


async def test_a_replica_that_left_and_came_back_holds_nothing() -> None:
    replicas = [idle("r0"), idle("r1")]
    router = Router(replicas)
    replicas[1].say(cache=CacheEvents(stored=block_hashes(PROMPT), reset=True))
    router.update(replicas[:1], Outlook())
    replicas[1].say(cache=CacheEvents(stored=block_hashes(PROMPT)))  # nobody listens any more
    router.update(replicas, Outlook())
    explanation = await router.explain(PROMPT)
    assert [r.num_cached_tokens for r in explanation.replicas] == [0, 0]


async def test_a_prompt_on_its_way_counts_before_any_report_knows_of_it() -> None:
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


async def test_hashing_is_shared_resumed_and_leaves_the_last_token() -> None:
    hashing = Hashing()
    prompt = list(range(16 * 600))
    first, second = (Stream(request(n, prompt), order=(0, 0)) for n in "ab")
    await asyncio.gather(hashing.extend(first, 16), hashing.extend(second, 16))
    assert first.block_hashes == second.block_hashes == block_hashes(prompt)[:-1], "the last token is always computed"
    first.output_token_ids = list(range(20))
    await hashing.extend(first, 16)
    assert first.block_hashes == block_hashes(prompt + first.output_token_ids)
    assert len(second.block_hashes) == 599


async def test_late_binding_chooses_when_there_is_room() -> None:
    """The waiting request goes where room comes first, not where the queue looked shortest when it arrived."""
    replicas = [idle(f"r{i}", max_num_seqs=1, hold_after=1) for i in range(2)]
    router = Router(replicas)
    running = [asyncio.create_task(collect(router, f"q{i}")) for i in range(5)]
    while sum(len(r.requests) for r in replicas) < 4:
        await asyncio.sleep(0)
    assert [len(r.requests) for r in replicas] == [2, 2], "one runs and one is next, on each"
    assert router.num_waiting == 1
    replicas[1].release.set()
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    while router.num_waiting:
        await asyncio.sleep(0)
    assert replicas[1].requests[-1].request_id == "q4"
    replicas[0].release.set()
    assert await asyncio.gather(*running) == [[5, 6]] * 5


async def test_room_that_a_frame_tells_of_is_used_at_once() -> None:
    replica = idle("r0", max_num_seqs=4)
    replica.load = LoadReport(num_running=4, num_waiting=4)  # another gateway's
    router = Router([replica])
    running = asyncio.create_task(collect(router))
    while not router.num_waiting:
        await asyncio.sleep(0)
    replica.say(num_waiting=0)
    assert router.num_waiting == 0
    assert await running == [5, 6]


# Admission


async def test_no_ready_replica_is_a_reason() -> None:
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
            raise AssertionError("there is room for one only")
        assert error.value.retry_after_s > 0
        assert router.num_inflight_requests == 2
        assert await collect(router), "one more fits, and generate admits itself"
        with router.admit(1), pytest.raises(OverloadedError):
            await collect(router)
    assert router.num_inflight_requests == 0


async def test_waiting_tokens_are_bounded_and_the_refusal_says_when_to_come_back() -> None:
    replica = idle("r0", max_num_seqs=1, hold_after=0)
    router = Router([replica], max_queued_tokens=100)
    running = [asyncio.create_task(collect(router, f"q{i}", PROMPT)) for i in range(3)]
    while router.num_waiting < 1:
        await asyncio.sleep(0)
    assert router.num_queued_tokens == 65
    replica.say(tokens_per_s=10.0, num_pending_tokens=135, num_running=1, num_waiting=1)
    with pytest.raises(OverloadedError, match=r"65 prompt tokens wait .* at most 100") as error, router.admit(1, 36):
        pass
    assert error.value.retry_after_s == 33, (
        "135 on the replica, the 130 it was sent a moment ago, 65 here, at 10 a second"
    )
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
        assert router.num_queued_tokens == 1000, "what no queue could hold, an empty one takes"
    assert router.num_queued_tokens == 0
    assert router.report("g", "u").arrived_tokens_total == 3 * 65 + 35 + 1000


async def test_closing_the_stream_aborts_and_accounts() -> None:
    replica = FakeReplica(tokens([5, 6, 7]))
    router = Router([replica])
    async with contextlib.aclosing(router.generate(request())) as deltas:
        assert (await anext(deltas)).token_ids == [5]
        assert (replica.num_open, router.num_inflight_requests) == (1, 1)
    assert (replica.num_open, router.num_inflight_requests) == (0, 0)
    assert replica.aborted == ["r"]


async def test_shutting_down_admits_nothing_and_lets_what_runs_end() -> None:
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
    router.update([], Outlook(expected=True, reason="Replica r0 is loading (40 %).", facts=facts))
    assert (router.health().ready, router.health().reason) == (False, "Replica r0 is loading (40 %).")
    assert router.facts == facts
    with router.admit(1, 10):
        pass
    router.update([], Outlook(expected=True, asleep=True, facts=facts))
    assert (router.health().ready, router.health().reason) == (True, "No replica runs; the next request starts one.")
    router.update([], Outlook(reason="The weights are damaged."))
    with pytest.raises(ReplicaUnavailableError, match="The weights are damaged"), router.admit(1, 10):
        pass


async def test_the_report_tells_of_first_tokens() -> None:
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
    assert router.report("g", "u").ttft_p95_s is None, "only the last half minute counts"


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
