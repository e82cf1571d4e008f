"""Real engines and the whole gateway: the serving replica dies at every output token, and the client gets the same bytes.

Engines, sockets, router, detokenizer and HTTP are real; the connection to the serving replica breaks after an exact number of tokens.
This requires that a token and its log-probability depend on the sequence alone, not on whether its keys and values were computed one by
one, in chunks or found in a cache.

`make test` tries every 16th token, the first two and the last; `make test-chaos` every token.
"""

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.checkpoints.adapters import write_adapter
from support.checkpoints.quantized.checkpoints import write_quantized
from support.checkpoints.tiny import write_tiny_checkpoint
from support.native import native_library
from support.servers.live_replica import TOKEN, TOKENIZER, LiveReplica
from support.servers.relay import CuttingRelay

from cluster.adapters.served import ServedAdapters
from cluster.api.app import make_app
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState
from cluster.replicas.client import ReplicaClient
from cluster.router.router import Availability, Router

NUM_TOKENS = 64
AT_A_TIME = 8  # streams in one batch, like streams that move together
# These differ between any two runs, the last one because the caches fill.
_MODEL = re.compile(rb'"model": ?"[^"]*"')
_OWN = re.compile(rb'"(id|created|cached_tokens)": ?("[^"]*"|\d+)')
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 3},
    "sampled": {
        "temperature": 0.9,
        "top_p": 0.95,
        "seed": 11,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "min_tokens": 20,
        "logprobs": 2,
    },
}

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 8, "maxLength": 30},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "é"]}, "minItems": 3, "maxItems": 6},
        "count": {"type": "integer", "minimum": 100, "maximum": 99999},
    },
    "required": ["name", "tags", "count"],
    "additionalProperties": False,
}
STRUCTURED: dict[str, dict[str, Any]] = {
    "json": {"structured_outputs": {"json": SCHEMA}, "logprobs": 1},
    "regex": {"structured_outputs": {"regex": "([a-z]{2,9}-[0-9]{3}; ){4,6}end"}, "temperature": 1.4},
}


@pytest.fixture(scope="module")
def all_replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LiveReplica]]:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=TOKENIZER.vocab_size, sliding_window=24)
    settings = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
    overlap = {"r0": False, "r1": False, "overlapped": True}
    replicas = {name: LiveReplica(folder, replica_id=name, overlap=on, **settings) for name, on in overlap.items()}
    yield replicas
    for replica in replicas.values():
        replica.close()
    assert not [t.name for t in threading.enumerate() if t.name in ("engine", "stream-server")]


@pytest.fixture
def replicas(all_replicas: dict[str, LiveReplica]) -> list[LiveReplica]:
    return [all_replicas["r0"], all_replicas["r1"]]


@contextlib.asynccontextmanager
async def serving(
    replicas: list[LiveReplica], *, cut_after: int | None, adapters: ServedAdapters | None = None
) -> AsyncIterator[tuple[TestClient, Router, CuttingRelay]]:
    async with (
        CuttingRelay(replicas[0].address, cut_after=cut_after) as relay,
        ReplicaClient("r0", relay.address, TOKEN) as first,
        ReplicaClient("r1", replicas[1].address, TOKEN) as second,
    ):
        async with asyncio.timeout(10):
            while not all(c.is_ready(time.monotonic()) for c in (first, second)):
                await asyncio.sleep(0.01)
        router = Router([first, second], policy="round_robin")
        router.update([first, second], Availability())
        app = make_app(router=router, tokenizer=TOKENIZER, chat_template=None, model_name="tiny", adapters=adapters)
        async with TestClient(TestServer(app)) as client:
            yield client, router, relay


async def answer(
    replicas: list[LiveReplica], body: dict[str, Any], *, cut_after: int | None, adapters: ServedAdapters | None = None
) -> bytes:
    async with serving(replicas, cut_after=cut_after, adapters=adapters) as (client, router, relay):
        response = await client.post("/v1/completions", json=body, headers={"X-Tramontane-Debug": "1"})
        data = await response.read()
        assert response.status == 200, data
        assert relay.is_cut == (cut_after is not None), f"the connection should have broken after {cut_after} tokens"
        assert router.num_failovers_total == int(cut_after is not None)
        assert router.num_numerics_changes_total == 0, "the replicas compute the same"
        assert router.num_inflight_requests == 0
    return _OWN.sub(rb'"\1":0', data)


def a_late_stop_string(whole: bytes) -> str:
    """Some characters that occur for the first time near the end of the output."""
    text = json.loads(whole)["choices"][0]["text"]
    return next(text[i : i + 4] for i in range(len(text) * 3 // 4, 0, -1) if text.find(text[i : i + 4]) == i)


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.chaos)])
@pytest.mark.parametrize(
    ("kind", "stream", "names"),
    [
        ("greedy", False, ("r0", "r1")),
        ("greedy", True, ("overlapped", "r1")),
        ("sampled", False, ("r0", "overlapped")),
        ("sampled", True, ("overlapped", "overlapped")),
    ],
    ids=["greedy-whole", "greedy-streamed", "sampled-whole", "sampled-streamed"],
)
async def test_the_bytes_are_the_same_when_the_replica_dies_at_any_token(
    all_replicas: dict[str, LiveReplica], kind: str, stream: bool, names: tuple[str, str], every: int
) -> None:
    """names: the replica that dies and the one that goes on. Whether their steps overlap makes no difference."""
    plain, replicas = [all_replicas["r1"]] * 2, [all_replicas[name] for name in names]
    prompt = "def fibonacci(n):\n    a, b = 0, 1\n    while n:"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, **SAMPLINGS[kind]}
    num_tokens = NUM_TOKENS
    if kind == "sampled":
        whole = await answer(plain, body, cut_after=None)
        body["stop"] = [a_late_stop_string(whole)]
        num_tokens = json.loads(await answer(plain, body, cut_after=None))["usage"]["completion_tokens"]
        assert NUM_TOKENS // 2 < num_tokens < NUM_TOKENS, "the stop string must end the output, and late"
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    undisturbed = await answer(plain, body, cut_after=None)
    wrong, all_cuts = [], sorted({1, *range(0, num_tokens, every), num_tokens - 1})
    for start in range(0, len(all_cuts), AT_A_TIME):
        cuts = all_cuts[start : start + AT_A_TIME]
        answers = await asyncio.gather(*(answer(replicas, body, cut_after=i) for i in cuts))
        wrong += [i for i, data in zip(cuts, answers, strict=True) if data != undisturbed]
    assert not wrong, f"the bytes differ when the replica dies after these numbers of tokens: {wrong}"
    await all_is_free(replicas)


@pytest.fixture(
    params=[
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "quantization": "int8"},
        {"quantization": "int4"},
        {"kv_cache_dtype": "int8"},
        {"dtype": "bfloat16", "quantization": "int4", "kv_cache_dtype": "int8"},
        {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
        {"checkpoint": "gptq, act-order, asymmetric"},
        {"checkpoint": "pack-quantized", "dtype": "bfloat16", "kv_cache_dtype": "int8"},
    ],
    ids=lambda settings: " ".join(settings.values()),
)
def compiled_replicas(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[LiveReplica]]:
    """Two that compute alike, with the compiled kernels."""
    native_library("avx2")  # skips where there can be none
    settings = {"max_num_batched_tokens": 16, "max_num_seqs": 8, **request.param}
    overrides: dict[str, Any] = {"vocab_size": TOKENIZER.vocab_size, "sliding_window": 24}
    if (kind := settings.pop("checkpoint", None)) is None:
        folder = write_tiny_checkpoint(tmp_path, **overrides)
    else:
        folder, _ = write_quantized(tmp_path, kind, **overrides)
    replicas = [LiveReplica(folder, replica_id=name, **settings) for name in ("r0", "r1")]
    yield replicas
    for replica in replicas:
        replica.close()


@pytest.mark.parametrize("every", [21, pytest.param(1, marks=pytest.mark.chaos)])
async def test_other_data_types_of_weights_and_kv_cache_keep_the_bytes_too(
    compiled_replicas: list[LiveReplica], every: int
) -> None:
    """Sampled and streamed after many tokens; greedy, whole, and within a grammar after some."""
    body = {"model": "tiny", "prompt": "def fibonacci(n):", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    bodies = {
        "sampled": body | SAMPLINGS["sampled"] | {"stream": True},
        "greedy": body | SAMPLINGS["greedy"],
        "grammar": {"model": "tiny", "prompt": "x = ", "max_tokens": 200, "seed": 4, **STRUCTURED["json"]},
    }
    undisturbed = {name: await answer(compiled_replicas, one, cut_after=None) for name, one in bodies.items()}
    assert json.loads(undisturbed["grammar"])["choices"][0]["finish_reason"] == "stop"
    cases = [("sampled", i) for i in (1, *range(every, NUM_TOKENS, every))]
    cases += [("greedy", i) for i in range(NUM_TOKENS // 2, NUM_TOKENS, every)] + [("grammar", 2), ("grammar", 13)]
    wrong = []
    for start in range(0, len(cases), AT_A_TIME):
        some = cases[start : start + AT_A_TIME]
        answers = await asyncio.gather(*(answer(compiled_replicas, bodies[name], cut_after=i) for name, i in some))
        wrong += [case for case, data in zip(some, answers, strict=True) if data != undisturbed[case[0]]]
    assert not wrong, f"the bytes differ when the replica dies after these numbers of tokens: {wrong}"
    await all_is_free(compiled_replicas)


@pytest.mark.parametrize("every", [31, pytest.param(1, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}], ids=["float32", "bfloat16"])
async def test_a_stream_of_an_adapter_continues_on_its_own_revision(
    tmp_path: Path, settings: dict[str, Any], every: int
) -> None:
    """Beside streams of the base and of another revision, and while its name serves another revision already."""
    if settings:
        native_library("avx2")
    folder = write_tiny_checkpoint(tmp_path / "model", vocab_size=TOKENIZER.vocab_size, sliding_window=24)
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_lora": True, "max_loras": 2, **settings}
    replicas = [LiveReplica(folder, replica_id=name, **options) for name in ("r0", "r1")]
    served, ids = ServedAdapters(), []
    for seed in range(2):
        source = write_adapter(tmp_path / f"a{seed}", replicas[0].core.config.model, seed=seed)
        ids = [*ids, *{replica.load_adapter("support", source) for replica in replicas}]
    revisions = tuple(
        AdapterRevision(id=i, name="support", source="", digest="", rank=4, num_bytes=1, state=RevisionState.READY)
        for i in ids
    )
    served.update(Registry(adapters=(Adapter(name="support", current=ids[0]),), revisions=revisions))
    body = {"model": "support", "prompt": "def fibonacci(n):", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    body |= {"stream": True, **SAMPLINGS["sampled"]}
    try:
        others = [body | {"model": name} for name in (ids[1], "tiny")]
        undisturbed = await answer(replicas, body, cut_after=None, adapters=served)
        alone = [await answer(replicas, other, cut_after=None, adapters=served) for other in others]
        assert len({_MODEL.sub(b"", data) for data in (undisturbed, *alone)}) == 3, (
            "the adapters must make a difference"
        )
        served.update(
            Registry(adapters=(Adapter(name="support", current=ids[1], previous=ids[0]),), revisions=revisions)
        )
        body |= {"model": ids[0]}
        for cut in [1, *range(every, NUM_TOKENS, every)]:
            one, *beside = await asyncio.gather(
                answer(replicas, body, cut_after=cut, adapters=served),
                *(answer(replicas, other, cut_after=None, adapters=served) for other in others),
            )
            assert _MODEL.sub(b"", one) == _MODEL.sub(b"", undisturbed), f"it died after {cut} tokens"
            assert beside == alone, "a stream beside it changed"
        await all_is_free(replicas)
    finally:
        for replica in replicas:
            replica.close()


@pytest.mark.parametrize("kind", STRUCTURED)
async def test_the_bytes_are_the_same_when_the_replica_dies_within_a_grammar(
    replicas: list[LiveReplica], kind: str
) -> None:
    """The other replica continues at the same position: the text is the same, and it matches the grammar."""
    body = {"model": "tiny", "prompt": "x = ", "max_tokens": 200, "seed": 4, **STRUCTURED[kind]}
    undisturbed = await answer(replicas, body, cut_after=None)
    whole = json.loads(undisturbed)
    choice, num_tokens = whole["choices"][0], whole["usage"]["completion_tokens"]
    assert choice["finish_reason"] == "stop"
    if kind == "json":
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    else:
        assert re.fullmatch(STRUCTURED[kind]["structured_outputs"]["regex"], choice["text"])
    streamed = await answer(replicas, body | {"stream": True}, cut_after=None)
    cuts = [0, 1, num_tokens // 3, num_tokens // 2, num_tokens - 2, num_tokens - 1]
    # Half of them streamed, the others whole: that both are the same at any token is shown above.
    bodies = [body | {"stream": i % 2 == 1} for i in range(len(cuts))]
    answers = await asyncio.gather(*(answer(replicas, b, cut_after=i) for b, i in zip(bodies, cuts, strict=True)))
    wrong = [
        cut
        for cut, one, data in zip(cuts, bodies, answers, strict=True)
        if data != (streamed if one["stream"] else undisturbed)
    ]
    assert not wrong, f"the bytes differ when the replica dies after these numbers of tokens: {wrong}"
    await all_is_free(replicas)


async def all_is_free(replicas: list[LiveReplica]) -> None:
    async with asyncio.timeout(10):  # the last aborts are still on their way
        while any(r.core.has_work() or r.core.kv_cache.pool.num_used for r in replicas):
            await asyncio.sleep(0.01)
