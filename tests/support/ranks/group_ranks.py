"""What the ranks of test_distributed.py run, each in a process of its own. Sends what it saw."""

import threading
import time
from multiprocessing.connection import Connection

import numpy as np
import torch

from workers.errors import GroupError
from workers.parallel.distributed import DistributedGroup
from workers.parallel.join import join_group

TIMEOUT_S = 2.0
MESSAGE_LENGTHS = (0, 1, 1023, 1024, 1025, 5000)  # around what fits in one Gloo message


def main(rank: int, size: int, port: int, result: Connection) -> None:
    torch.set_num_threads(1)
    tp = join_group(
        rank=rank,
        size=size,
        device="cpu",
        replica_id="unused",
        master_address="127.0.0.1",
        master_port=port,
        same_host=False,
        timeout_s=TIMEOUT_S,
        join_timeout_s=60.0,
    )
    assert isinstance(tp, DistributedGroup)
    seen: dict[str, object] = {}
    x = torch.arange(6.0).view(2, 3) + 10 * rank
    assert tp.all_reduce(x) is x
    seen["all_reduce"] = x.tolist()
    rows = torch.randn(5, 37, generator=torch.Generator().manual_seed(rank))
    together = tp.all_reduce(rows.clone())
    alone = [tp.all_reduce(row.clone()) for row in rows]
    seen["rows depend on others"] = not torch.equal(torch.stack(alone), together)
    gathered = tp.gather(torch.full((2, 2), rank))
    seen["gather"] = None if gathered is None else gathered.tolist()
    seen["broadcast_tensor"] = tp.broadcast_tensor(torch.full((2, 2), 7 + rank)).tolist()
    seen["min"] = tp.min((1 << 40) - rank)
    messages = [np.arange(n, dtype=np.int32) for n in MESSAGE_LENGTHS]
    seen["broadcast"] = all(np.array_equal(tp.broadcast(None if rank else m), m) for m in messages)
    if rank == 0:
        time.sleep(1.5 * TIMEOUT_S)  # idle for longer than a step may take
    seen["after idling"] = tp.broadcast(None if rank else np.array([5], np.int32)).tolist()

    if rank == size - 1:
        result.send(seen)
        time.sleep(600)  # stuck, until the test kills it
    waiting: list[tuple[int, ...]] = []
    watcher = threading.Timer(0.7 * TIMEOUT_S, lambda: waiting.append(tp.waiting_for()))
    watcher.start()
    try:
        tp.all_reduce(x)
    except GroupError as e:
        seen["missing"] = e.ranks
    watcher.join()
    seen["waiting_for"] = waiting[0]
    try:
        tp.min(0)
    except GroupError as e:
        seen["afterwards"] = str(e)
    tp.close()
    result.send(seen)
