"""ShardWorker without Ray: its phases on one rank and on two, the socket it serves, and how it ends."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import make_config, make_engine, make_request
from tiny import write_tiny_checkpoint

from cluster.replicas.client import ReplicaClient
from workers.errors import CheckpointError
from workers.shard import ShardWorker

TOKEN = "secret"
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
        incarnation = f"test-{threading.get_native_id()}-{id(self)}"
        self.ranks = [
            ShardWorker(
                config,
                rank,
                replica_id="r0",
                incarnation=incarnation,
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
        self.on_all("join", *self.ranks[0].address("127.0.0.1"), same_host=True)
        self.on_all("load")
        return self.on_all("start")


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.group)])
async def test_phases_lead_to_a_socket_that_generates(folder, expected, size):
    threads_before = set(threading.enumerate())
    replica = Replica(folder, size)
    started, *others = replica.start()
    assert others == [None] * (size - 1), "only rank 0 serves"
    assert all(done == total > 0 for done, total in replica.on_all("progress"))
    assert (started.facts.replica_id, started.facts.tensor_parallel_size) == ("r0", size)
    async with ReplicaClient("r0", (started.host, started.port), TOKEN) as client:
        assert client.facts == started.facts
        tokens = [t async for d in client.generate(REQUEST) for t in d.token_ids]
    assert tokens == expected
    replica.on_all("close")
    assert replica.on_all("wait") == [None] * size
    assert replica.broken == []
    left = [t for t in set(threading.enumerate()) - threads_before if t.name in ("engine", "stream-server", "follower")]
    assert left == []


def test_a_checkpoint_that_does_not_fit_is_told_by_load(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    (rank,) = Replica(tmp_path, 1).ranks
    rank.join("127.0.0.1", 1, same_host=True)
    with pytest.raises(CheckpointError):
        rank.load()


def test_a_broken_engine_ends_the_rank_and_says_why(folder, monkeypatch):
    replica = Replica(folder, 1)
    replica.start()
    (rank,) = replica.ranks

    def fail():
        raise RuntimeError("boom")

    monkeypatch.setattr(rank._core, "heartbeat", fail)
    assert rank.wait() == "Rank 0 of replica r0 stopped: RuntimeError: boom"
    rank._loop._thread.join(10)
    assert replica.broken == [0], "the process must end: half a replica must not look alive"
    rank.close()
