"""One rank of a 7B replica on a fake GPU of its own: `rank.py RANK SIZE PORT`. Prints what each step asked of the device, as JSON.

NCCL is as fake as the GPU: no rank waits for the other there. All messages of the host are real.
"""

import json
import sys

from cuda_host.engines import make_config, make_core, make_request, make_runner
from cuda_host.fake_device import FakeDevice

from workers.engine.follower import run_follower
from workers.parallel.join import join_group
from workers.parallel.timed import TimedGroup

NUM_SEQS = 8

rank, size, port = map(int, sys.argv[1:])
device = FakeDevice()
tp = TimedGroup(
    join_group(
        rank=rank,
        size=size,
        device="cuda",
        replica_id="r",
        master_address="127.0.0.1",
        master_port=port,
        same_host=True,
    )
)
config = make_config(tensor_parallel_size=size, max_num_seqs=NUM_SEQS)
steps: list[list[str]] = []
device.start_recording()


def next_step(seconds: float = 0.0) -> None:
    steps.append(device.stop_recording().calls)
    device.start_recording()


if rank == 0:
    core = make_core(config, tp)
    next_step()
    for i in range(NUM_SEQS):
        core.add_request(make_request(str(i), 100, max_tokens=12))
    while core.has_work():
        core.step()
        next_step()
    core.shutdown()
    runner = core.runner
else:
    runner = make_runner(config, tp)
    next_step()
    run_follower(runner, tp, next_step)
tp.close()
facts = {"num_blocks": runner.num_blocks, "captured_sizes": runner.graphs.captured_sizes, "steps": steps}
json.dump(facts | {"unknown_calls": device.unknown_calls}, sys.stdout)
