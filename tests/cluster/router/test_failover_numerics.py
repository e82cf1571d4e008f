"""Real replicas with different instruction sets, made on one CPU by the limits of the libraries: which of them compute the same bits, and
what becomes of a stream that moves to one that does not.

`make test` starts one such replica, `make test-chaos` one for each limit and data type.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.engines import make_config, make_request
from support.ranks.worker_ranks import TOKEN as RANKS_TOKEN
from support.ranks.worker_ranks import RankProcesses
from support.servers.live_replica import DEMO, TOKEN, TOKENIZER, LiveReplica
from support.servers.relay import CuttingRelay

from cluster.api.app import make_app
from cluster.replicas.client import ReplicaClient
from cluster.router.router import Availability, Router
from workers.protocol import GenerateRequest, TokenDelta

pytestmark = pytest.mark.group

NUM_TOKENS, CUT_AFTER = 24, 13
PROMPT = "def fibonacci(n):\n    a, b = 0, 1\n    while n:"
ONEDNN, TORCH, OURS = "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "TRAMONTANE_CPU_ISA"
OLD_CPU = {ONEDNN: "SSE41", TORCH: "default", OURS: "none"}
MOVED, COMMENT = "X-Tramontane-Moved", ": X-Tramontane-Moved: other-numerics"


@pytest.fixture(scope="module")
def here() -> Iterator[LiveReplica]:
    replica = LiveReplica(replica_id="here")
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def old() -> Iterator[RankProcesses]:
    """A replica of the same model on an old CPU."""
    with RankProcesses(make_config(DEMO, tokenizer_path=str(TOKENIZER.path)), environ=OLD_CPU) as ranks:
        yield ranks


def reach(ranks: RankProcesses) -> ReplicaClient:
    assert ranks.started is not None
    return ReplicaClient("there", (ranks.started.host, ranks.started.port), RANKS_TOKEN)


async def ready(*clients: ReplicaClient) -> None:
    async with asyncio.timeout(20):
        while not all(c.is_ready(time.monotonic()) for c in clients):
            await asyncio.sleep(0.01)


async def run(client: ReplicaClient, req: GenerateRequest) -> list[TokenDelta]:
    return [delta async for delta in client.generate(req)]


def greedy(name: str = "bits") -> GenerateRequest:
    return make_request(name, TOKENIZER.encode(PROMPT), max_tokens=NUM_TOKENS, temperature=0.0, logprobs=5)


async def bits_of(client: ReplicaClient) -> list[Any]:
    """All tokens and log-probabilities of an output, which is what a client could see of the logits' last bits."""
    return [(d.token_ids, d.logprobs) for d in await run(client, greedy())]


@contextlib.asynccontextmanager
async def serving(
    old: RankProcesses, here: LiveReplica, *, cut_after: int
) -> AsyncIterator[tuple[TestClient, Router, ReplicaClient]]:
    """The old replica serves first, and dies after some tokens."""
    assert old.started is not None
    async with (
        CuttingRelay((old.started.host, old.started.port), cut_after=cut_after) as relay,
        ReplicaClient("there", relay.address, RANKS_TOKEN) as first,
        ReplicaClient("here", here.address, TOKEN) as second,
    ):
        await ready(first, second)
        router = Router([first, second], policy="round_robin", numerics_wait_s=0.2)
        router.update([first, second], Availability(expected=True))
        app = make_app(router=router, tokenizer=TOKENIZER, chat_template=None, model_name="demo")
        async with TestClient(TestServer(app)) as client:
            yield client, router, second


async def test_replicas_with_other_bits_have_other_numerics(here: LiveReplica, old: RankProcesses) -> None:
    async with ReplicaClient("here", here.address, TOKEN) as a, reach(old) as b:
        await ready(a, b)
        assert a.facts.numerics.startswith(f"float32-{a.facts.attention_backend}-tp1-")
        same_bits = await bits_of(a) == await bits_of(b)
        assert (a.facts.numerics == b.facts.numerics) == same_bits, "the fingerprint must tell what the logits do"
        assert not same_bits, "these limits leave no instruction set that could give the same bits"


async def test_a_stream_that_moves_to_other_numerics_is_whole_and_says_so(
    here: LiveReplica, old: RankProcesses
) -> None:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    async with reach(old) as there:
        await ready(there)
        before = [i for d in await run(there, greedy()) for i in d.token_ids][:CUT_AFTER]
    async with serving(old, here, cut_after=CUT_AFTER) as (client, router, second):
        response = await client.post("/v1/completions", json=body | {"return_token_ids": True})
        whole = await response.json()
        assert response.headers[MOVED] == "other-numerics"
        resumed = make_request("rest", TOKENIZER.encode(PROMPT), max_tokens=NUM_TOKENS, temperature=0.0)
        after = [i for d in await run(second, continued(resumed, before)) for i in d.token_ids]
        assert whole["choices"][0]["token_ids"] == before + after, "what one began, the other continued from there"
        metrics = await (await client.get("/metrics")).text()
        assert 'tramontane:num_failovers_other_numerics_total{model_name="demo"} 1.0' in metrics
        assert f'numerics="{second.facts.numerics}"' in metrics
        response = await client.post("/v1/completions", json=body)
        assert MOVED not in response.headers, "this one did not move"
    async with serving(old, here, cut_after=CUT_AFTER) as (client, router, _):
        response = await client.post("/v1/completions", json=body | {"stream": True})
        blocks = (await response.text()).strip().split("\n\n")
        assert MOVED not in response.headers, "they were sent before"
        assert blocks.count(COMMENT) == 1
        assert 0 < blocks.index(COMMENT) < len(blocks) - 2, "the comment stands where the stream changes"
        assert blocks[-1] == "data: [DONE]"
        assert (router.num_failovers_total, router.num_numerics_changes_total) == (1, 1)


def continued(req: GenerateRequest, output: list[int]) -> GenerateRequest:
    return GenerateRequest(
        request_id=req.request_id,
        prompt_token_ids=req.prompt_token_ids,
        sampling=req.sampling,
        output_token_ids=output,
    )


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_each_limit_of_each_library(dtype: str) -> None:
    limits = [{}, {}, {ONEDNN: "AVX2"}, {TORCH: "avx2"}, {TORCH: "default"}, {OURS: "avx2"}, {OURS: "none"}]
    limits += [{ONEDNN: "AVX2", OURS: "none"}, {ONEDNN: "AVX2", TORCH: "avx2", OURS: "avx2"}, OLD_CPU]
    found = []
    for environ in limits:
        with RankProcesses(make_config(DEMO, dtype=dtype), environ=environ) as ranks:
            async with reach(ranks) as client:
                await ready(client)
                found.append((environ, client.facts.numerics, await bits_of(client)))
    wrong = [(a, b) for a, m, bits in found for b, n, others in found if m == n and bits != others]
    assert not wrong, f"the numerics are the same and the bits are not: {wrong}"
    assert len({numerics for _, numerics, _ in found}) > 1, "no limit changed anything, so this run shows nothing"
    assert found[0][1:] == found[1][1:], "two starts without limits compute the same"
