"""Many streams while replicas are lost, drained, paused and replaced at random: no wrong token, no failed request, nothing left over."""

import asyncio
import contextlib
import random
import time

import pytest
from support.fakes.replica import FakeReplica, tokens

from cluster.router.router import Availability, Router
from workers.errors import OverloadedError
from workers.protocol import GenerateRequest, LoadReport, SamplingParams, TokenDelta


def expected(request: GenerateRequest) -> list[int]:
    return [(request.sampling.seed + i) % 4096 for i in range(request.sampling.max_tokens)]


def script(request: GenerateRequest) -> list[TokenDelta]:
    return [d for d in tokens(expected(request))(request) if isinstance(d, TokenDelta)]


class Cluster:
    """Three replicas, and methods that disturb them at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.router = Router()
        self.all: list[FakeReplica] = []
        self.live: list[FakeReplica] = []
        for _ in range(3):
            self.start_one()
        self.update_router()

    def start_one(self) -> None:
        replica = FakeReplica(script, replica_id=f"r{len(self.all)}", max_num_seqs=4)
        replica.load = LoadReport()
        self.all.append(replica)
        self.live.append(replica)

    def update_router(self) -> None:
        self.router.update(self.live, Availability(expected=True, reason="A replica is being replaced."))

    def disturb_one(self) -> None:
        replica = self.rng.choice(self.live)
        what = self.rng.choice(["lose", "drain", "pause", "resume", "replace"])
        if what == "lose":
            replica.lose()
            self.live.remove(replica)
        elif what == "drain":
            replica.drain_until = time.monotonic() + self.rng.choice([0.0, 0.002])
        elif what == "pause":
            replica.reason = f"Replica {replica.replica_id} is waiting for rank 1, which does not answer."
        elif what == "resume":
            replica.reason = None
        if len(self.live) < 2 or what == "replace":
            gone = [r for r in self.live if r.drain_until is not None and not r.num_open]
            self.live = [r for r in self.live if r not in gone]
            while sum(r.drain_until is None for r in self.live) < 3:
                self.start_one()
        self.update_router()


@pytest.mark.parametrize("seed", range(6))
async def test_chaos(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(rng)
    router = cluster.router
    num_refused = 0

    async def client(number: int) -> None:
        nonlocal num_refused
        for i in range(10):
            sampling = SamplingParams(max_tokens=rng.randrange(1, 60), seed=rng.randrange(4096))
            prompt = [1] * rng.randrange(1, 50)
            request = GenerateRequest(request_id=f"{number}-{i}", prompt_token_ids=prompt, sampling=sampling)
            leaves_after = rng.choice([None, None, None, 0, 5])
            seen: list[int] = []
            try:
                async with contextlib.aclosing(router.generate(request)) as deltas:
                    async for delta in deltas:
                        assert delta.request_id == request.request_id
                        assert (delta.num_cached_tokens is not None) == (not seen)
                        seen += delta.token_ids
                        if leaves_after is not None and len(seen) > leaves_after:
                            break
                    else:
                        leaves_after = None
            except OverloadedError:
                num_refused += 1
                continue
            assert seen == expected(request)[: len(seen)]
            assert leaves_after is not None or len(seen) == sampling.max_tokens

    async def chaos() -> None:
        while True:
            for _ in range(8):
                await asyncio.sleep(0)
            cluster.disturb_one()

    disturbing = asyncio.create_task(chaos())
    async with asyncio.timeout(60):
        await asyncio.gather(*(client(n) for n in range(32)))
    disturbing.cancel()
    await asyncio.gather(disturbing, return_exceptions=True)
    assert router.num_failovers_total > 20, "too few failovers to prove anything"
    assert num_refused == 0
    assert (router.num_waiting, router.num_inflight_requests, router.num_queued_tokens) == (0, 0, 0)
    report = router.report("g", "u")
    assert (report.num_running, report.num_queued) == (0, 0)
    assert [r.replica_id for r in cluster.all if r.num_open] == []
