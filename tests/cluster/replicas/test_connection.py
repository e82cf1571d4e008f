"""The gateway's connection to rank 0, against a peer that sends its frames in any pieces."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from support.fakes.core import FACTS

from cluster.replicas.connection import ReplicaConnection
from workers.errors import ReplicaUnavailableError
from workers.protocol import (
    CacheEvents,
    Ending,
    FromReplica,
    Heartbeat,
    LoadReport,
    Refused,
    StepFrame,
    TokenDelta,
    encode_frame,
)

GREETING = encode_frame(FACTS) + encode_frame(StepFrame(deltas=[], load=LoadReport(num_running=1)))


@contextlib.asynccontextmanager
async def connected(pieces: Sequence[bytes], *, closes: bool = False) -> AsyncIterator[ReplicaConnection]:
    """A connection to a peer that sends these pieces one by one, then waits or closes."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)  # a socket that is closed with unread bytes is reset
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if not closes:
            await ended.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        connection = await ReplicaConnection.open("r0", server.sockets[0].getsockname(), token="t")
        yield connection
        connection.abort()
    finally:
        ended.set()
        server.close()


async def received(connection: ReplicaConnection, count: int) -> list[FromReplica]:
    found: list[FromReplica] = []
    done = asyncio.Event()

    def take(message: FromReplica) -> None:
        found.append(message)
        if len(found) == count:
            done.set()

    connection.listen(take)
    await asyncio.wait_for(done.wait(), 10)
    return found


def steps(count: int, *, num_tokens: int = 1) -> list[StepFrame]:
    deltas = [TokenDelta(request_id=str(i), token_ids=[i] * num_tokens) for i in range(count)]
    return [StepFrame(deltas=[delta], load=LoadReport()) for delta in deltas]


@pytest.mark.parametrize("piece_size", [1, 100, 10**6])
async def test_frames_arrive_in_order_whatever_the_pieces(piece_size):
    frames = [*steps(5, num_tokens=20), Ending(reason="over")]
    data = GREETING + b"".join(map(encode_frame, frames))
    pieces = [data[i : i + piece_size] for i in range(0, len(data), piece_size)]
    async with connected(pieces) as connection:
        assert connection.facts == FACTS
        assert connection.first_frame.load.num_running == 1
        assert await received(connection, len(frames)) == frames


async def test_a_large_frame_and_one_behind_it():
    frames = [
        StepFrame(deltas=[], load=LoadReport(), cache=CacheEvents(stored=[i.to_bytes(16) for i in range(50_000)])),
        *steps(1),
    ]
    async with connected([GREETING, b"".join(map(encode_frame, frames))]) as connection:
        assert await received(connection, 2) == frames


async def test_a_frame_that_cannot_be_read_ends_the_connection_with_the_reason():
    async with connected([GREETING, b"\x00\x00\x00\x03abc" + encode_frame(steps(1)[0])]) as connection:
        found: list[FromReplica] = []
        connection.listen(found.append)
        error = await asyncio.wait_for(connection.lost(), 10)
    assert isinstance(error, ValueError)
    assert found == [], "nothing after it is read"


async def test_a_connection_that_is_closed_has_no_error():
    async with connected([GREETING], closes=True) as connection:
        assert await asyncio.wait_for(connection.lost(), 10) is None
        connection.send(Heartbeat())  # dropped
        assert not connection.is_open


async def test_after_an_abort_nothing_is_delivered():
    async with connected([GREETING + b"".join(map(encode_frame, steps(10)))]) as connection:
        found: list[FromReplica] = []

        def take(message: FromReplica) -> None:
            found.append(message)
            connection.abort()

        connection.listen(take)
        await asyncio.wait_for(connection.lost(), 10)
    assert found == steps(1)


async def test_a_refusal_names_the_reason():
    with pytest.raises(ReplicaUnavailableError, match="the token is wrong"):
        async with connected([encode_frame(Refused(reason="the token is wrong"))]):
            pass


async def test_a_peer_that_closes_in_the_handshake_is_an_error():
    with pytest.raises(OSError, match="closed"):
        async with connected([encode_frame(FACTS)], closes=True):
            pass
