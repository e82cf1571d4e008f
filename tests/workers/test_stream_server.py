"""Rank 0's socket spoken to with raw frames, by well-behaved and by broken clients. The gateway's own client has its own tests."""

import asyncio
import contextlib

import msgspec
import pytest
from fake_core import FACTS, FakeCore, expected_tokens, request

import workers.stream_server
from workers.engine.loop import EngineLoop
from workers.protocol import (
    PROTOCOL_VERSION,
    Abort,
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
from workers.stream_server import StreamServer

TOKEN = "the replica's secret"
decoder = msgspec.msgpack.Decoder(FromReplica)


class Engine:
    """A fake core, its loop and its server, as ShardWorker wires them."""

    def __init__(self) -> None:
        self.core = FakeCore()
        self.loop = EngineLoop(self.core, lambda deltas: self.server.publish(deltas), idle_heartbeat_s=0.05)
        self.server = StreamServer(
            FACTS,
            TOKEN,
            submit=self.loop.submit,
            abort=self.loop.abort,
            load=self.core.load,
        )
        self.address = self.server.start()
        self.loop.start()

    def close(self) -> None:
        self.core.gate.set()
        assert self.loop.stop()
        self.server.close()


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

    async def closed_by_server(self) -> bool:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self.receive()
        return True


@pytest.fixture
def engine():
    engine = Engine()
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
        b"\x00\x00",  # and then nothing: closed when the client's patience, not ours, is up
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


async def test_deltas_of_one_step_share_a_frame_and_ids_belong_to_connections(engine, connect):
    one, two = await connect(), await connect()
    engine.core.gate.clear()
    requests = [request("same", seed=1), request("other", seed=50)]
    one.send(*(Submit(request=r) for r in requests))
    two.send(Submit(request=request("same", seed=300)))
    two.send(Abort(request_id="other"))  # not two's to abort
    await two.receive()
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
    monkeypatch.setattr(workers.stream_server, "STUCK_AFTER_S", 0.4)
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
    monkeypatch.setattr(workers.stream_server, "SILENCE_IS_DEATH_S", 0.6)
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
    monkeypatch.setattr(workers.stream_server, "MAX_UNSENT_BYTES", 100_000)
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


def test_a_taken_port_is_an_error_at_once(engine):
    with pytest.raises(OSError, match="in use"):
        StreamServer(FACTS, TOKEN, submit=print, abort=print, load=engine.core.load).start(*engine.address)
