"""ReplicaClient against a real StreamServer with a fake core, and against peers that die, hang or lie."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from support.fakes.core import FACTS, expected_tokens, request
from support.fakes.engine import TOKEN, FakeEngine

import cluster.replicas.client
import cluster.replicas.inbox
import cluster.replicas.readiness
import workers.rank.stuck_ranks
from cluster.replicas.client import ReplicaClient
from workers.errors import GroupError, ReplicaUnavailableError, RequestError
from workers.heartbeat import STANDSTILL_S
from workers.protocol import CacheEvents, FinishReason, LoadReport, StepFrame, encode_frame


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
async def client(engine):
    async with ReplicaClient("r0", engine.address, TOKEN) as client:
        yield client


async def until(condition, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def collect(client, req) -> list[int]:
    return [t async for d in client.generate(req) for t in d.token_ids]


async def test_facts_and_many_concurrent_streams(engine, client):
    assert client.facts == FACTS
    requests = [request(f"r{i}", max_tokens=1 + i, seed=i) for i in range(60)]
    results = await asyncio.gather(*(collect(client, r) for r in requests))
    assert results == [expected_tokens(r) for r in requests]
    assert client.num_streams == 0
    assert engine.core.aborted == []


async def test_closing_a_stream_early_aborts_it(engine, client):
    stream = client.generate(request("r", max_tokens=10**9))
    await anext(stream)
    assert engine.core.requests
    await stream.aclose()
    assert client.num_streams == 0
    await until(lambda: not engine.core.requests)


async def test_an_engine_error_reaches_the_stream_as_a_delta(client):
    deltas = [d async for d in client.generate(request("r", seed=666))]
    assert [d.finish_reason for d in deltas] == [FinishReason.ERROR]


async def test_a_wrong_token_says_so(engine):
    with pytest.raises(ReplicaUnavailableError, match="token"):
        await ReplicaClient("r0", engine.address, "wrong").connect()


async def test_an_address_where_nothing_listens_is_named():
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    server.close()
    await server.wait_closed()
    with pytest.raises(ReplicaUnavailableError, match=f"r7 could not be reached at 127.0.0.1:{address[1]}"):
        await ReplicaClient("r7", address, TOKEN).connect()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", encode_frame(StepFrame(deltas=[], load=LoadReport()))]
)
async def test_another_program_on_the_port_is_refused(answer):
    async def serve(reader, writer):
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        with pytest.raises(ReplicaUnavailableError, match="could not be reached"):
            await ReplicaClient("r0", server.sockets[0].getsockname(), TOKEN).connect()


async def test_readiness_follows_the_forward_passes(engine, client, monkeypatch):
    monkeypatch.setattr(cluster.replicas.readiness, "MAX_FORWARD_AGE_S", 0.5)
    monkeypatch.setattr(workers.rank.stuck_ranks, "STUCK_AFTER_S", 0.8)
    await until(lambda: client.is_ready(time.monotonic()))
    engine.core.gate.clear()
    await until(lambda: not client.is_ready(time.monotonic()))
    assert "last forward pass" in client.not_ready_reason(time.monotonic())
    engine.core.waiting_for = (1,)
    await until(lambda: client.load.stuck_ranks)
    assert client.not_ready_reason(time.monotonic()) == "Replica r0 is waiting for rank 1, which does not answer."
    engine.core.waiting_for = ()
    engine.core.gate.set()
    await until(lambda: client.is_ready(time.monotonic()))


async def test_readiness_ages_between_reports(engine, client):
    await until(lambda: client.is_ready(time.monotonic()))
    assert "last forward pass" in client.not_ready_reason(time.monotonic() + 60)


async def test_a_failed_engine_says_why_and_is_over(engine, client):
    streams = [client.generate(request(f"r{i}", max_tokens=10**9)) for i in range(3)]
    for stream in streams:
        await anext(stream)
    engine.core.fail_with = GroupError("Replica r0 lost rank 1: its process died.")
    for stream in streams:
        with pytest.raises(ReplicaUnavailableError, match=r"^Replica r0 lost rank 1: its process died\.$") as error:
            async for _ in stream:
                pass
        assert error.value.crashed, "one of its requests may be why"
    assert client.num_streams == 0
    assert client.condemned == client.not_ready_reason(time.monotonic()) == "Replica r0 lost rank 1: its process died."
    with pytest.raises(ReplicaUnavailableError):
        await anext(client.generate(request("late")))


async def test_a_closed_connection_alone_condemns_no_replica(engine, client):
    stream = client.generate(request("r", max_tokens=10**9))
    await anext(stream)
    await asyncio.to_thread(engine.server.close)
    with pytest.raises(ReplicaUnavailableError, match="r0 was lost: rank 0 closed the connection") as error:
        async for _ in stream:
            pass
    assert error.value.crashed, "as a killed process closes it"
    assert client.condemned is None
    assert "no connection" in client.not_ready_reason(time.monotonic())


async def test_a_stopped_replica_did_not_crash(engine, client):
    stream = client.generate(request("r", max_tokens=10**9))
    await anext(stream)
    await asyncio.to_thread(engine.server.close, reason="Replica r0 was stopped.", crashed=False)
    with pytest.raises(ReplicaUnavailableError, match=r"^Replica r0 was stopped\.$") as error:
        async for _ in stream:
            pass
    assert not error.value.crashed


async def test_a_connection_closed_because_this_process_stood_still_is_not_a_crash(engine, client):
    stream = client.generate(request("r", max_tokens=10**9))
    await anext(stream)
    closing = asyncio.get_running_loop().run_in_executor(None, engine.server.close)
    time.sleep(STANDSTILL_S + 0.1)  # blocks the loop on purpose: the other end closes in that time
    await closing
    with pytest.raises(ReplicaUnavailableError, match=r"closed the connection|reset by peer") as error:
        async for _ in stream:
            pass
    assert not error.value.crashed


async def test_a_reader_that_lags_is_cut_off(engine, client, monkeypatch):
    monkeypatch.setattr(cluster.replicas.inbox, "LAG_PATIENCE_S", 0.05)
    monkeypatch.setattr(cluster.replicas.inbox, "MAX_LAG_BYTES", 100_000)
    stream = client.generate(request("slow", max_tokens=10**9))
    await anext(stream)
    await until(lambda: client.num_streams == 0)
    await until(lambda: not engine.core.requests)
    with pytest.raises(RequestError, match="Read faster") as error:
        await anext(stream)
    assert error.value.code == "slow_reader"
    req = request("quick", max_tokens=3000)
    assert await collect(client, req) == expected_tokens(req), "more than may wait, but read at once"


async def test_a_listener_that_fails_leaves_no_stream_hanging(engine, client, caplog):
    stream = client.generate(request("r", max_tokens=10**9))
    await anext(stream)
    seen = []

    def listen(frame):
        if seen:
            raise ZeroDivisionError("a bug in the listener")
        seen.append(frame)

    client.on_frame = listen
    with pytest.raises(ReplicaUnavailableError, match="a bug in the listener"):
        async for _ in stream:
            pass
    assert client.num_streams == 0
    client.on_frame = None
    await until(lambda: client.is_ready(time.monotonic()))
    req = request("after")
    assert await collect(client, req) == expected_tokens(req)


async def test_a_new_listener_gets_what_was_reported_before(engine, client):
    engine.core.cache_events.append(CacheEvents(stored=[b"a", b"b"]))
    engine.core.cache_events.append(CacheEvents(evicted=[b"a"], stored=[b"c"]))
    await collect(client, request("before"))
    heard: list[StepFrame] = []
    client.on_frame = heard.append
    assert heard[0].cache is not None
    assert (heard[0].cache.reset, sorted(heard[0].cache.stored)) == (True, [b"b", b"c"])
    assert heard[0].load == client.load
    engine.core.cache_events.append(CacheEvents(stored=[b"d"]))
    await collect(client, request("after"))
    events = [f.cache for f in heard[1:] if f.cache is not None]
    assert [e.stored for e in events] == [[b"d"]]
    assert not any(e.reset for e in events)


async def test_a_new_connection_begins_with_all_that_is_cached(monkeypatch):
    monkeypatch.setattr(cluster.replicas.client, "RECONNECT_AFTER_S", 0.02)
    engine = FakeEngine()
    async with ReplicaClient("r0", engine.address, TOKEN) as client:
        heard: list[StepFrame] = []
        client.on_frame = heard.append
        await asyncio.to_thread(engine.close)
        await until(lambda: not client.is_ready(time.monotonic()))
        num_before = len(heard)
        engine = FakeEngine(port=engine.address[1])
        await until(lambda: client.is_ready(time.monotonic()))
        first = heard[num_before].cache
        assert first is not None
        assert first.reset, "what was known before the connection was lost may be out of date"
    await asyncio.to_thread(engine.close)


async def test_reconnects_when_rank_0_is_back(monkeypatch):
    monkeypatch.setattr(cluster.replicas.client, "RECONNECT_AFTER_S", 0.02)
    engine = FakeEngine()
    async with ReplicaClient("r0", engine.address, TOKEN) as client:
        await asyncio.to_thread(engine.close)
        await until(lambda: not client.is_ready(time.monotonic()))
        engine = FakeEngine(port=engine.address[1])
        await until(lambda: client.is_ready(time.monotonic()))
        req = request("again")
        assert await collect(client, req) == expected_tokens(req)
    await asyncio.to_thread(engine.close)


@contextlib.asynccontextmanager
async def relayed(engine: FakeEngine) -> AsyncIterator[tuple[ReplicaClient, asyncio.Event]]:
    """A client that connects through a relay. Clear the event, and it stops passing bytes on: a cut cable, without FIN or RST."""
    flowing = asyncio.Event()
    flowing.set()
    tasks = []

    async def relay(reader, writer):
        up_reader, up_writer = await asyncio.open_connection(*engine.address)

        async def pump(source, sink):
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    await flowing.wait()
                    sink.write(data)

        tasks.extend(asyncio.create_task(p) for p in (pump(reader, up_writer), pump(up_reader, writer)))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    client = ReplicaClient("r0", server.sockets[0].getsockname(), TOKEN)
    await client.connect()
    try:
        yield client, flowing
    finally:
        await client.close()
        server.close()
        for task in tasks:
            task.cancel()


async def test_silence_is_death(engine, monkeypatch):
    monkeypatch.setattr(cluster.replicas.client, "SILENCE_IS_DEATH_S", 0.6)
    async with relayed(engine) as (client, flowing):
        stream = client.generate(request("r", max_tokens=10**9))
        await anext(stream)
        flowing.clear()
        with pytest.raises(ReplicaUnavailableError, match="silent") as error:
            async for _ in stream:
                pass
        assert not error.value.crashed, "frozen or cut off: no request did that"
        assert not client.is_ready(time.monotonic())


async def test_silence_is_an_outage_only_after_a_while(engine, monkeypatch):
    """On a busy machine a report may be late. New requests wait for it, and /health waits longer, even if the connection was given up."""
    monkeypatch.setattr(cluster.replicas.client, "SILENCE_IS_DEATH_S", 1.0)
    monkeypatch.setattr(cluster.replicas.readiness, "HEALTH_PATIENCE_S", 3.0)
    async with relayed(engine) as (client, flowing):
        await until(lambda: client.is_ready(time.monotonic()))
        flowing.clear()
        began = time.monotonic()
        await until(lambda: not client.connected)
        assert not client.is_ready(time.monotonic())
        assert client.unhealthy_reason(time.monotonic()) is None, "it may be back in a moment"
        await until(lambda: client.unhealthy_reason(time.monotonic()) is not None)
        assert time.monotonic() - began > 2.0
        assert "silent" in client.unhealthy_reason(time.monotonic())
        flowing.set()
        await until(lambda: client.unhealthy_reason(time.monotonic()) is None)


async def test_a_replica_that_has_ended_is_an_outage_at_once(engine, client):
    await until(lambda: client.is_ready(time.monotonic()))
    await asyncio.to_thread(engine.server.close)
    await until(lambda: not client.connected)
    assert "rank 0 closed the connection" in client.unhealthy_reason(time.monotonic())
    client.condemn("Replica r0 lost rank 1: its process died.")
    assert client.unhealthy_reason(time.monotonic()) == "Replica r0 lost rank 1: its process died."


async def test_condemn_ends_streams_with_the_given_reason(engine, client):
    stream = client.generate(request("r", max_tokens=10**9))
    await anext(stream)
    client.condemn("Replica r0 lost rank 1: its process died.")
    with pytest.raises(ReplicaUnavailableError, match="lost rank 1") as error:
        async for _ in stream:
            pass
    assert not error.value.crashed, "the caller that condemns it does not know"
    assert client.not_ready_reason(time.monotonic()) == "Replica r0 lost rank 1: its process died."
    await until(lambda: not engine.core.requests)


async def test_a_long_step_is_accepted_until_it_is_too_long(engine, client, monkeypatch):
    monkeypatch.setattr(cluster.replicas.readiness, "MAX_FORWARD_AGE_S", 0.1)
    monkeypatch.setattr(cluster.replicas.readiness, "MAX_STEP_S", 2.0)
    engine.core.step_age_s = 0.5
    engine.core.gate.clear()
    await until(lambda: client.load.step_age_s and client.load.forward_age_s > 0.6)
    assert client.is_ready(time.monotonic())
    assert "last forward pass" in client.not_ready_reason(time.monotonic() + 2.0)
    engine.core.gate.set()
