"""Rank 0's socket with raw frames, from well-behaved and from broken clients. The gateway's own client has its own tests."""

import asyncio
import contextlib
import time

import msgspec
import pytest
from support.fakes.core import FACTS, expected_tokens, request
from support.fakes.engine import TOKEN, FakeEngine

import workers.rank.connection
import workers.rank.server
import workers.rank.stuck_ranks
from workers.heartbeat import RECENTLY_S
from workers.protocol import (
    PROTOCOL_VERSION,
    Abort,
    CacheEvents,
    Ending,
    EngineFacts,
    FromReplica,
    Heartbeat,
    Hello,
    Refused,
    StepFrame,
    Submit,
    TokenDelta,
    encode_frame,
)
from workers.rank.server import StreamServer

decoder = msgspec.msgpack.Decoder(FromReplica)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *messages) -> None:
        for message in messages:
            self.writer.write(encode_frame(message))

    async def receive(self):
        async with asyncio.timeout(10):
            length = int.from_bytes(await self.reader.readexactly(4), "big")
            return decoder.decode(await self.reader.readexactly(length))

    async def deltas(self, request_id: str) -> list[TokenDelta]:
        found = []
        while not found or found[-1].finish_reason is None:
            message = await self.receive()
            assert isinstance(message, StepFrame)
            found += [d for d in message.deltas if d.request_id == request_id]
        return found

    async def until_cached(self, block_hash: bytes) -> list[CacheEvents]:
        """All cache events up to those that store this block."""
        found = []
        while True:
            message = await self.receive()
            self.send(Heartbeat())
            if isinstance(message, StepFrame) and message.cache is not None:
                found.append(message.cache)
                if block_hash in message.cache.stored:
                    return found

    async def closed_by_server(self) -> bool:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self.receive()
        return True


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
async def connect(engine):
    writers = []

    async def connect(*, hello: bool = True) -> Client:
        reader, writer = await asyncio.open_connection(*engine.address)
        writers.append(writer)
        client = Client(reader, writer)
        if hello:
            client.send(Hello(token=TOKEN))
            assert isinstance(await client.receive(), EngineFacts)
        return client

    yield connect
    for writer in writers:
        writer.transport.abort()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_hello_is_answered_with_the_facts(connect):
    client = await connect(hello=False)
    client.send(Hello(token=TOKEN))
    assert await client.receive() == FACTS


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(token="wrong"), "token"),
        (Hello(token=""), "token"),
        (Hello(token=TOKEN, version=PROTOCOL_VERSION + 1), "protocol"),
    ],
)
async def test_a_wrong_hello_is_refused_by_name_and_closed(connect, hello, reason):
    client = await connect(hello=False)
    client.send(hello)
    answer = await client.receive()
    assert isinstance(answer, Refused)
    assert reason in answer.reason
    assert await client.closed_by_server()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",  # announces 4 GiB
        b"\x00\x00\x20\x01" + b"x",  # more than a Hello may be
        b"\x00\x00\x00\x03abc",
        b"GET / HTTP/1.1\r\n\r\n",
        encode_frame(Heartbeat()),
        encode_frame(Submit(request=request("early"))),
        b"\x00\x00",  # and then nothing: the client ends it
    ],
)
async def test_garbage_before_hello_costs_only_that_connection(engine, connect, garbage):
    good, bad = await connect(), await connect(hello=False)
    bad.writer.write(garbage)
    if len(garbage) < 4:
        bad.writer.write_eof()
    assert await bad.closed_by_server()
    good.send(Submit(request=request("r")))
    assert (await good.deltas("r"))[-1].finish_reason is not None
    assert engine.core.aborted == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x03abc",
        encode_frame(Hello(token=TOKEN)),
        (lambda body: len(body).to_bytes(4, "big") + body)(msgspec.msgpack.encode({"type": "submit", "request": 1})),
        encode_frame(Submit(request=request("mine", max_tokens=500))) * 2,  # the same id twice
    ],
)
async def test_garbage_after_hello_aborts_what_the_connection_had(engine, connect, garbage):
    engine.core.gate.clear()
    good, bad = await connect(), await connect()
    good.send(Submit(request=request("g", max_tokens=40)))
    bad.send(Submit(request=request("b", max_tokens=500)))
    bad.writer.write(garbage)
    assert await bad.closed_by_server()
    engine.core.gate.set()
    assert len(await good.deltas("g")) == 40
    await until(lambda: not engine.core.requests)
    assert any(r.endswith("/b") for r in engine.core.aborted)


async def test_each_prompts_log_probabilities_have_a_frame_of_their_own(engine, connect):
    """Together they could be more than a frame holds."""
    engine.core.gate.clear()
    client = await connect()
    client.send(*(Submit(request=request(name)) for name in "abc"))
    await until(lambda: len(engine.submitted) == 3)
    deltas = [TokenDelta(request_id=r, prompt_logprobs=None if r.endswith("a") else [None]) for r in engine.submitted]
    engine.server.publish(deltas)
    frames: list[list[str]] = []
    while len(frames) < 3:
        message = await client.receive()
        client.send(Heartbeat())
        if message.deltas:
            frames.append([d.request_id for d in message.deltas])
    assert frames == [["a"], ["b"], ["c"]]
    engine.core.gate.set()


async def test_deltas_of_one_step_share_a_frame_and_ids_belong_to_connections(engine, connect):
    one, two = await connect(), await connect()
    engine.core.gate.clear()
    requests = [request("same", seed=1), request("other", seed=50)]
    one.send(*(Submit(request=r) for r in requests))
    two.send(Submit(request=request("same", seed=300)))
    two.send(Abort(request_id="other"))  # not two's to abort
    await until(lambda: len(engine.submitted) == 3)
    engine.core.gate.set()
    frames, tokens = [], {"same": [], "other": []}
    while len(tokens["other"]) < 5:
        frame = await one.receive()
        frames.append(frame)
        for d in frame.deltas:
            tokens[d.request_id] += d.token_ids
    assert tokens == {r.request_id: expected_tokens(r) for r in requests}
    assert max(len(f.deltas) for f in frames) == 2
    assert [t for d in await two.deltas("same") for t in d.token_ids] == expected_tokens(request("same", seed=300))
    assert engine.core.aborted == []


async def test_abort_and_disconnect_free_the_request(engine, connect):
    client = await connect()
    client.send(Submit(request=request("a", max_tokens=10**6)), Submit(request=request("b", max_tokens=10**6)))
    await until(lambda: len(engine.core.requests) == 2)
    client.send(Abort(request_id="a"), Abort(request_id="unknown"))
    await until(lambda: len(engine.core.requests) == 1)
    client.writer.close()
    await until(lambda: not engine.core.requests)


async def test_heartbeats_come_while_the_engine_hangs_and_name_the_stuck_rank(engine, connect, monkeypatch):
    monkeypatch.setattr(workers.rank.stuck_ranks, "STUCK_AFTER_S", 0.4)
    client = await connect()
    await until(lambda: engine.core.num_heartbeats > 0)
    engine.core.gate.clear()
    engine.core.waiting_for = (1,)
    ages = []
    while True:
        frame = await client.receive()
        client.send(Heartbeat())
        ages.append(frame.load.forward_age_s)
        if frame.load.stuck_ranks:
            break
    assert frame.load.stuck_ranks == (1,)
    assert ages[-1] >= 0.4
    engine.core.waiting_for = ()
    engine.core.gate.set()
    while (await client.receive()).load.stuck_ranks:
        client.send(Heartbeat())


async def test_a_silent_client_is_closed_and_a_talking_one_is_not(engine, connect, monkeypatch):
    monkeypatch.setattr(workers.rank.server, "SILENCE_IS_DEATH_S", 0.6)
    silent, talking = await connect(), await connect()
    silent.send(Submit(request=request("s", max_tokens=10**6)))

    async def talk() -> None:
        while True:
            talking.send(Heartbeat())
            await asyncio.sleep(0.1)

    task = asyncio.create_task(talk())
    assert await silent.closed_by_server()
    await until(lambda: not engine.core.requests)
    talking.send(Submit(request=request("t")))
    assert len(await talking.deltas("t")) == 5
    task.cancel()


async def test_a_client_that_does_not_read_is_cut_off(engine, connect, monkeypatch):
    monkeypatch.setattr(workers.rank.connection, "MAX_UNSENT_BYTES", 100_000)
    deaf, good = await connect(), await connect()
    deaf.writer.transport.pause_reading()
    deaf.send(*(Submit(request=request(f"d{i}", max_tokens=10**7)) for i in range(500)))

    async def talk() -> None:
        while True:
            deaf.send(Heartbeat())
            good.send(Heartbeat())
            await asyncio.sleep(0.1)

    task = asyncio.create_task(talk())
    await until(lambda: engine.core.requests)
    async with asyncio.timeout(30):
        while engine.core.requests:
            await asyncio.sleep(0.05)
    good.send(Submit(request=request("g")))
    assert len(await good.deltas("g")) == 5
    task.cancel()


async def test_close_flushes_what_was_published(engine, connect):
    client = await connect()
    client.send(Submit(request=request("r", max_tokens=3)))
    deltas = await client.deltas("r")
    assert len(deltas) == 3
    closer = asyncio.create_task(asyncio.to_thread(engine.server.close))
    assert await client.closed_by_server()
    await closer


async def test_a_connection_begins_with_all_that_is_cached_and_goes_on_with_what_changes(engine, connect):
    engine.core.cache_events.extend(
        [
            CacheEvents(stored=[b"a", b"b", b"c"]),
            CacheEvents(evicted=[b"a"], stored=[b"d"]),
            CacheEvents(evicted=[b"b"], stored=[b"a"]),  # a is stored again
        ]
    )
    early = await connect()
    assert (await early.receive()).cache == CacheEvents(reset=True), "nothing is cached yet, and the frame says so"
    early.send(Submit(request=request("r", max_tokens=3)))
    assert await early.until_cached(b"d")
    await until(lambda: not engine.core.cache_events and not engine.core.requests)
    late = await connect()
    assert (await late.receive()).cache == CacheEvents(stored=[b"c", b"d", b"a"], reset=True)
    engine.core.cache_events.append(CacheEvents(evicted=[b"c"], stored=[b"e"]))
    early.send(Submit(request=request("s", max_tokens=1)))
    for client in (early, late):  # the second has no part in that step
        assert (await client.until_cached(b"e"))[-1] == CacheEvents(evicted=[b"c"], stored=[b"e"])


async def test_events_reach_a_connection_without_tokens_added_up_and_soon(engine, connect):
    busy, idle = await connect(), await connect()
    assert (await idle.receive()).cache.reset
    engine.core.gate.clear()
    # x is stored and evicted before the idle connection gets a frame, k is evicted and stored; the busy one gets each step's events.
    engine.core.cache_events.extend(
        [
            CacheEvents(stored=[b"k", b"x"]),
            CacheEvents(evicted=[b"k", b"x"]),
            CacheEvents(stored=[b"k"]),
            CacheEvents(stored=[b"end"]),
        ]
    )
    busy.send(Submit(request=request("r", max_tokens=4)))
    engine.core.gate.set()
    for client in (busy, idle):
        known: set[bytes] = set()
        for events in await client.until_cached(b"end"):
            known = (set() if events.reset else known - set(events.evicted)) | set(events.stored)
        assert known == {b"k", b"end"}


async def test_without_prefix_caching_frames_carry_no_cache_events():
    engine = FakeEngine(msgspec.structs.replace(FACTS, enable_prefix_caching=False))
    try:
        client = Client(*await asyncio.open_connection(*engine.address))
        client.send(Hello(token=TOKEN))
        await client.receive()
        assert (await client.receive()).cache is None
        client.writer.close()
    finally:
        engine.close()


async def test_the_ending_reaches_every_client_even_one_that_is_sending(engine, connect):
    clients = [await connect() for _ in range(3)]
    for client in clients:
        client.send(Submit(request=request("r", max_tokens=10**6)))
        client.send(*[Heartbeat()] * 1000)  # unread by the server when it closes: a reset would discard the last frame
    await until(lambda: len(engine.core.requests) == 3)
    engine.core.gate.clear()  # this engine computes nothing, and makes frames faster than clients read them
    closer = asyncio.create_task(asyncio.to_thread(engine.server.close, reason="The replica is over."))

    async def read_to_the_end(client):
        client.send(*[Heartbeat()] * 1000)
        messages = []
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                messages.append(await client.receive())
        assert messages[-1] == Ending(reason="The replica is over.")
        assert all(d.finish_reason is None for m in messages[:-1] for d in getattr(m, "deltas", ()))
        client.writer.close()

    await asyncio.gather(*map(read_to_the_end, clients))
    await closer


async def test_a_client_that_says_hello_while_the_server_ends_learns_why(engine, connect):
    client = await connect(hello=False)
    await until(lambda: engine.server._num_accepted == 1)
    closer = asyncio.create_task(asyncio.to_thread(engine.server.close, reason="The replica is over."))
    await until(lambda: engine.server._stop.is_set())
    client.send(Hello(token=TOKEN))
    messages = []
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            messages.append(await client.receive())
    assert messages[-1] == Ending(reason="The replica is over.")
    client.writer.close()
    await closer


async def test_a_client_that_does_not_read_cannot_delay_the_end(engine, connect):
    await connect()
    began = asyncio.get_running_loop().time()
    await asyncio.to_thread(engine.server.close, reason="The replica is over.")
    assert asyncio.get_running_loop().time() - began < 3.0


async def test_a_replica_that_every_gateway_has_left_is_reported_once(engine, connect, monkeypatch):
    monkeypatch.setattr(workers.rank.server, "ORPHAN_AFTER_S", 0.6)
    await asyncio.sleep(1.0)
    assert engine.orphaned == [], "no gateway has connected yet: the replica is new"
    one, two = await connect(), await connect()
    one.writer.close()
    for _ in range(4):
        two.send(Heartbeat())
        await asyncio.sleep(0.25)
    assert engine.orphaned == [], "a gateway is still connected"
    two.writer.close()
    await until(lambda: engine.orphaned)
    await asyncio.sleep(0.6)
    assert engine.orphaned == ["no gateway has been connected for 0.6 s"]


def test_a_taken_port_is_an_error_at_once(engine):
    with pytest.raises(OSError, match="in use"):
        StreamServer(FACTS, TOKEN, submit=print, abort=print, load=engine.core.load).start(*engine.address)


@pytest.mark.parametrize("how", ["python", "native"])
async def test_heartbeats_do_not_depend_on_the_engine_thread(engine, connect, how):
    """A step of 3 s: in Python, which shares the interpreter's lock, or in native code that has released it."""
    client = await connect()
    step_s = 3.0

    def busy() -> list[TokenDelta]:
        del engine.core.step  # once
        until = time.monotonic() + step_s
        while how == "python" and time.monotonic() < until:
            sum(range(1000))
        time.sleep(max(0.0, until - time.monotonic()))
        return []

    engine.core.step = busy
    client.send(Submit(request=request("a")))
    await until(lambda: engine.core.requests)
    began = last = time.monotonic()
    longest_s = 0.0
    while time.monotonic() < began + step_s:
        await client.receive()
        client.send(Heartbeat())
        longest_s, last = max(longest_s, time.monotonic() - last), time.monotonic()
    assert longest_s < RECENTLY_S, f"{longest_s:.2f} s without a report"
