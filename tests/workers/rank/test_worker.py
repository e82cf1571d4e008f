"""RankWorker without Ray: its phases on one rank and on two, the socket it serves, what it reports, and how it ends."""

import asyncio
import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config, make_engine, make_request

import workers.parallel.join
import workers.rank.server
import workers.rank.worker
from cluster.replicas.client import ReplicaClient
from workers.engine.core import EngineCore
from workers.engine.execution.model_runner import ModelRunner
from workers.errors import CheckpointError
from workers.protocol import Ending, FromReplica, Hello, encode_frame
from workers.rank.lifeline import Lifeline
from workers.rank.reports import RankDescription, Rendezvous
from workers.rank.worker import RankWorker

TOKEN = "secret"
COLLECTIVE_S = 2.0  # more than a collective of a tiny model needs, less than a silent gateway is tolerated
REQUEST = make_request("r", [5, 6, 7, 8, 9], max_tokens=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def expected(folder):
    return make_engine(folder).generate([REQUEST])[0]


class Replica:
    """Ranks as threads of this process; the group's collectives do not mind."""

    def __init__(self, folder, size: int) -> None:
        config = make_config(folder, tensor_parallel_size=size)
        self.broken: list[int] = []
        self.incarnation = f"test-{threading.get_native_id()}-{id(self)}"
        self.ranks = [
            RankWorker(
                config,
                rank,
                replica_id="r0",
                incarnation=self.incarnation,
                token=TOKEN,
                on_broken=lambda rank=rank: self.broken.append(rank),
            )
            for rank in range(size)
        ]

    def on_all(self, method: str, *args, **kwargs) -> list:
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(getattr(rank, method), *args, **kwargs) for rank in self.ranks]
        return [f.result() for f in futures]

    def start(self):
        self.on_all("join", self.ranks[0].address("127.0.0.1"), same_host=True)
        self.on_all("load")
        return self.on_all("start")


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.group)])
async def test_phases_lead_to_a_socket_that_generates(folder, expected, size):
    threads_before = set(threading.enumerate())
    replica = Replica(folder, size)
    started, *others = replica.start()
    assert others == [None] * (size - 1), "only rank 0 serves"
    assert all(p.num_bytes_read == p.num_bytes_total > 0 for p in replica.on_all("progress"))
    assert (started.facts.replica_id, started.facts.tensor_parallel_size) == ("r0", size)
    async with ReplicaClient("r0", (started.host, started.port), TOKEN) as client:
        assert client.facts == started.facts
        tokens = [t async for d in client.generate(REQUEST) for t in d.token_ids]
    assert tokens == expected
    replica.on_all("close")
    assert replica.on_all("wait") == [None] * size
    assert replica.broken == []
    left = [
        t
        for t in set(threading.enumerate()) - threads_before
        if t.name in ("engine", "stream-server", "follower", "lifeline")
    ]
    assert left == []


def test_load_reports_a_checkpoint_that_does_not_fit(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    (rank,) = Replica(tmp_path, 1).ranks
    rank.join(Rendezvous(host="127.0.0.1", port=1, lifeline_port=0), same_host=True)
    with pytest.raises(CheckpointError):
        rank.load()


def test_a_broken_engine_ends_the_rank_and_says_why(folder, monkeypatch):
    replica = Replica(folder, 1)
    replica.start()
    (rank,) = replica.ranks

    def fail(self):
        raise RuntimeError("boom")

    monkeypatch.setattr(EngineCore, "heartbeat", fail)
    assert end(replica) == ["Rank 0 of replica r0 stopped: RuntimeError: boom"]
    assert (rank.describe().phase, rank.has_ended(0.0).has_ended) == ("ended", True)
    rank.close()


@pytest.mark.group
async def test_ranks_describe_themselves_and_count_their_work(folder):
    replica = Replica(folder, 2)
    leader, follower = replica.ranks
    assert repr(follower) == "Rank(r0/1)"
    assert leader.describe() == RankDescription(
        replica_id="r0",
        incarnation=replica.incarnation,
        rank=0,
        pid=os.getpid(),
        hostname=socket.gethostname(),
        phase="joining",
    )
    assert not leader.has_ended(0.0).has_ended
    started = replica.start()[0]
    assert [r.describe().phase for r in replica.ranks] == ["serving"] * 2
    assert follower.describe().token is None, "only rank 0 serves"
    adopted = leader.describe()
    assert TOKEN not in repr(adopted), "a secret must not get into logs"
    async with ReplicaClient("r0", adopted.address, adopted.token) as client:
        assert client.facts == adopted.facts == started.facts
        before = replica.on_all("stats")
        async for _ in client.generate(REQUEST):
            pass
        after = replica.on_all("stats")
    for rank in (0, 1):
        assert after[rank].num_steps_total >= before[rank].num_steps_total + 20, f"rank {rank}"
        # Per step one all-reduce for the embedding and two a layer.
        per_step = 1 + 2 * leader.config.model.num_hidden_layers
        assert after[rank].num_all_reduces_total >= after[rank].num_steps_total * per_step
        assert 0 < after[rank].all_reduce_s_total < after[rank].step_s_total < 60
    replica.on_all("close")


def end(replica: Replica) -> list[str | None]:
    """Each rank's own reason, when all have ended."""
    reasons = replica.on_all("wait")
    deadline = time.monotonic() + 10
    while len(replica.broken) < len(replica.ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(replica.broken) == list(range(len(replica.ranks))), "every process must end, once"
    return reasons


def replace_follower_execute(monkeypatch, run: Callable[[], object]) -> None:
    """From now on a step runs this on the follower; rank 0 goes on as before."""
    execute = ModelRunner.execute

    def choose(self, batch, *args):
        return run() if threading.current_thread().name == "follower" else execute(self, batch, *args)

    monkeypatch.setattr(ModelRunner, "execute", choose)


@pytest.mark.group
async def test_the_reason_of_a_failing_follower_reaches_rank_0_and_the_gateway(folder, monkeypatch):
    replica = Replica(folder, 2)
    started = replica.start()[0]
    reader, writer = await asyncio.open_connection(started.host, started.port)
    writer.write(encode_frame(Hello(token=TOKEN)))

    def fail():
        raise MemoryError("no room")

    replace_follower_execute(monkeypatch, fail)
    reason = "Rank 1 of replica r0 stopped: MemoryError: no room"
    assert await asyncio.to_thread(end, replica) == [reason] * 2
    assert (await last_message(reader)) == Ending(reason=reason)
    writer.close()


@pytest.mark.group
async def test_a_rank_whose_program_hangs_is_named_when_the_collective_times_out(folder, monkeypatch):
    """Its process lives and its lifeline too: only the collective can tell."""
    join_group = workers.parallel.join.join_group
    monkeypatch.setattr(workers.parallel.join, "join_group", functools.partial(join_group, timeout_s=COLLECTIVE_S))
    replica = Replica(folder, 2)
    started = replica.start()[0]
    reader, writer = await asyncio.open_connection(started.host, started.port)
    writer.write(encode_frame(Hello(token=TOKEN)))
    go_on = threading.Event()
    replace_follower_execute(monkeypatch, go_on.wait)
    reasons = await asyncio.to_thread(end, replica)
    go_on.set()
    assert reasons[0].startswith("Rank 0 of replica r0 stopped: ")
    assert reasons[0].endswith(f"Rank 1 did not answer within {COLLECTIVE_S:g} s.")
    assert reasons[1] == reasons[0], "the hanging rank ends for the same reason"
    assert (await last_message(reader)) == Ending(reason=reasons[0])
    writer.close()


async def test_a_replica_that_every_gateway_has_left_ends_itself(folder, monkeypatch):
    monkeypatch.setattr(workers.rank.server, "ORPHAN_AFTER_S", 0.5)
    replica = Replica(folder, 1)
    _, writer = await greet(replica.start()[0])
    writer.close()
    reasons = await asyncio.to_thread(end, replica)
    assert reasons == ["Replica r0 ended itself: no gateway has been connected for 0.5 s."]
    replica.on_all("close")  # what the end of the process would do: the engine goes on here


@pytest.mark.parametrize(
    ("how", "crashed"), [("its process died", True), ("it has given no sign of life for 3.2 s", False)]
)
async def test_gateways_are_told_whether_a_request_may_have_brought_a_lost_rank_down(folder, monkeypatch, how, crashed):
    lifelines = []

    class KeptLifeline(Lifeline):
        def __init__(self, rank, *, on_lost, **options) -> None:
            super().__init__(rank, on_lost=on_lost, **options)
            lifelines.append(on_lost)

    monkeypatch.setattr(workers.rank.worker, "Lifeline", KeptLifeline)
    replica = Replica(folder, 1)
    started = replica.start()[0]
    reader, writer = await greet(started)
    (on_lost,) = lifelines
    await asyncio.to_thread(on_lost, 1, how)  # as the lifeline calls it, on a thread of its own
    (reason,) = await asyncio.to_thread(end, replica)
    assert reason == f"Replica r0 lost rank 1: {how}."
    assert (await last_message(reader)) == Ending(reason=reason, crashed=crashed)
    writer.close()
    await asyncio.to_thread(replica.on_all, "close")


async def test_a_replica_that_is_stopped_says_that_it_did_not_crash(folder):
    replica = Replica(folder, 1)
    started = replica.start()[0]
    reader, writer = await greet(started)
    await asyncio.to_thread(replica.on_all, "close")
    assert (await last_message(reader)) == Ending(reason="Replica r0 was stopped.", crashed=False)
    writer.close()


async def greet(started) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that rank 0 has answered."""
    reader, writer = await asyncio.open_connection(started.host, started.port)
    writer.write(encode_frame(Hello(token=TOKEN)))
    await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
    return reader, writer


async def last_message(reader: asyncio.StreamReader):
    decoder = msgspec.msgpack.Decoder(FromReplica)
    message = None
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            header = await reader.readexactly(4)
            message = decoder.decode(await reader.readexactly(int.from_bytes(header, "big")))
    return message
