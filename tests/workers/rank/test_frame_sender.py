"""Frames from several threads over a real socket pair: whole, in order, and never waiting for the peer."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from workers.rank.frame_sender import FrameSender

LIMIT = 1 << 20


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The sender's socket, with a small buffer, and the peer's. Both block no thread."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for sock in (ours, theirs):
        sock.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
async def sender(pair):
    sender = FrameSender(pair[0], asyncio.get_running_loop(), max_unsent_bytes=LIMIT)
    yield sender
    sender.close()


async def receive(sock: socket.socket, num_bytes: int) -> bytes:
    """Up to `num_bytes`; fewer at the end of the stream."""
    found = bytearray()
    async with asyncio.timeout(10):
        while len(found) < num_bytes:
            data = await asyncio.get_running_loop().sock_recv(sock, 65536)
            if not data:
                break
            found += data
    return bytes(found)


async def test_a_frame_is_sent_by_the_thread_that_has_it(pair, sender):
    thread = threading.Thread(target=sender.send, args=(b"frame",))
    thread.start()
    thread.join()
    # The loop had no turn since.
    assert pair[1].recv(100) == b"frame"


async def test_what_the_socket_does_not_take_follows_in_order(pair, sender):
    frames = [bytes([i]) * 3000 for i in range(100)]
    assert all(sender.send(frame) for frame in frames)
    assert await receive(pair[1], 300_000) == b"".join(frames)
    assert sender.send(b"again")
    assert pair[1].recv(100) == b"again", "with nothing queued it is sent at once"


async def test_threads_do_not_mix_their_frames(pair, sender):
    size, count = 997, 50

    def send(byte: int) -> None:
        for _ in range(count):
            assert sender.send(bytes([byte]) * size)

    threads = [threading.Thread(target=send, args=(byte,)) for byte in range(4)]
    for thread in threads:
        thread.start()
    data = await receive(pair[1], 4 * count * size)
    for thread in threads:
        thread.join()
    frames = [data[i : i + size] for i in range(0, len(data), size)]
    assert all(len(set(frame)) == 1 for frame in frames)
    assert sorted(frame[0] for frame in frames) == sorted([0, 1, 2, 3] * count)


async def test_a_peer_that_reads_nothing_is_reported_once(pair, sender):
    sent = [sender.send(bytes(100_000)) for _ in range(20)]
    assert sent.count(False) == 1
    assert 9 <= sent.index(False) <= 11, "the limit, and what the socket holds"


async def test_the_end_follows_what_is_queued(pair, sender):
    frame = bytes(200_000)
    sender.send(frame)
    sender.finish()
    assert sender.send(b"too late"), "dropped in silence"
    ending = asyncio.create_task(sender.sent())
    assert await receive(pair[1], 1 << 30) == frame
    await asyncio.wait_for(ending, 10)


async def test_without_a_queue_the_end_comes_at_once(pair, sender):
    sender.send(b"last")
    sender.finish()
    await asyncio.wait_for(sender.sent(), 10)
    assert await receive(pair[1], 100) == b"last"


@pytest.mark.parametrize("num_bytes", [5, 500_000])
async def test_a_peer_that_is_gone_costs_nothing(pair, sender, num_bytes):
    sender.send(bytes(num_bytes))
    pair[1].close()
    assert sender.send(b"more")
    sender.finish()
    await asyncio.wait_for(sender.sent(), 10)


async def test_close_drops_what_is_queued_and_keeps_no_descriptor(pair, sender):
    sender.send(bytes(500_000))
    sender.close()
    sender.close()
    await asyncio.wait_for(sender.sent(), 10)
    pair[0].close()
    assert len(await receive(pair[1], 1 << 30)) < 500_000
