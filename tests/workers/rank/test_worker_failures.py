"""A replica of two real processes that loses one: what its gateway reads, how soon, and how the others end."""

import asyncio
import os
import re
import signal
import sys
import time

import msgspec
import pytest
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_request
from support.ranks.worker_ranks import TOKEN, RankProcesses

from workers.protocol import (
    SILENCE_IS_DEATH_S,
    Ending,
    FromReplica,
    Heartbeat,
    Hello,
    StepFrame,
    Submit,
    encode_frame,
)
from workers.rank.worker import BROKEN_EXIT_CODE

pytestmark = pytest.mark.group

ENDING_WITHIN_S = SILENCE_IS_DEATH_S  # measured: some ten milliseconds; the rest is a busy machine's
decoder = msgspec.msgpack.Decoder(FromReplica)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")), tensor_parallel_size=2)


@pytest.fixture
def tell(capsys):
    """Prints what was measured, whatever pytest captures."""

    def tell(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {line}\n")

    return tell


class Gateway:
    """Reads frames, and says that it lives, until the last one."""

    def __init__(self, reader, writer) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, started) -> "Gateway":
        gateway = cls(*await asyncio.open_connection(started.host, started.port))
        gateway.writer.write(encode_frame(Hello(token=TOKEN)))
        return gateway

    async def frame(self):
        async with asyncio.timeout(20):
            length = int.from_bytes(await self.reader.readexactly(4), "big")
            self.writer.write(encode_frame(Heartbeat()))
            return decoder.decode(await self.reader.readexactly(length))

    async def deltas(self):
        while True:
            message = await self.frame()
            if isinstance(message, StepFrame) and message.deltas:
                return message.deltas

    async def ending(self) -> tuple[str, float]:
        """The replica's last words and when they were read. No request may have been ended by them."""
        while True:
            message = await self.frame()
            if isinstance(message, Ending):
                at = time.monotonic()
                assert await self.reader.read() == b"", "more after the last words"
                self.writer.close()
                return message.reason, at
            if isinstance(message, StepFrame):
                assert [d for d in message.deltas if d.finish_reason is not None] == []


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_killed_follower_is_named_to_every_gateway_at_once(config, busy, tell):
    with RankProcesses(config) as ranks:
        gateways = [await Gateway.connect(ranks.started) for _ in range(2)]
        if busy:
            for gateway in gateways:
                gateway.writer.write(encode_frame(Submit(request=make_request("r", [5, 6, 7], max_tokens=500))))
                await gateway.deltas()
        killed_at = time.monotonic()
        ranks.processes[1].kill()
        for gateway in gateways:
            reason, at = await gateway.ending()
            assert reason == "Replica r0 lost rank 1: its process died."
            assert at - killed_at < ENDING_WITHIN_S
            tell(f"SIGKILL of rank 1 to Ending, {'busy' if busy else 'idle'}: {1000 * (at - killed_at):.1f} ms")
        assert ranks.exit_codes() == [BROKEN_EXIT_CODE, -signal.SIGKILL]


async def test_a_frozen_follower_is_named_and_does_not_survive(config, tell):
    with RankProcesses(config) as ranks:
        gateway = await Gateway.connect(ranks.started)
        stopped_at = time.monotonic()
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        reason, at = await gateway.ending()
        assert re.match(r"Replica r0 lost rank 1: it has given no sign of life for [3-7]\.\d s", reason)
        assert at - stopped_at < SILENCE_IS_DEATH_S + 5.0
        tell(f"SIGSTOP of rank 1 to Ending: {at - stopped_at:.2f} s")
        assert ranks.exit_codes() == [BROKEN_EXIT_CODE, -signal.SIGKILL]


def test_a_follower_does_not_survive_rank_0(config):
    with RankProcesses(config) as ranks:
        began = time.monotonic()
        ranks.processes[0].kill()
        assert ranks.exit_codes() == [-signal.SIGKILL, BROKEN_EXIT_CODE]
        assert time.monotonic() - began < 20.0


def test_a_rank_that_dies_before_serving_ends_the_others(config):
    with RankProcesses(config, until="join") as ranks:
        began = time.monotonic()
        ranks.processes[1].kill()
        assert ranks.exit_codes() == [BROKEN_EXIT_CODE, -signal.SIGKILL]
        assert time.monotonic() - began < 20.0
