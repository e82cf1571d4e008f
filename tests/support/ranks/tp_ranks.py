"""Runs a tensor-parallel engine over real processes, one per rank, without Ray."""

import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from support.ranks.forked import forking
from workers.config import EngineConfig
from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.engine.follower import run_follower
from workers.engine.llm_engine import run_requests
from workers.native.exchange import native_exchange
from workers.parallel.join import join_group
from workers.protocol import GenerateRequest

TIMEOUT_S = 100.0


def generate_on_ranks(config: EngineConfig, requests: Sequence[GenerateRequest], *, backend: str) -> list[list[int]]:
    """Output token ids in the order of `requests`, computed by `config.tensor_parallel_size` processes."""
    context = forking()
    results: Any = context.Queue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    size = config.tensor_parallel_size
    processes = [
        context.Process(target=_rank, args=(config, requests, backend, rank, port, results)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        outputs = None
        for _ in range(size):
            rank, outcome = results.get(timeout=TIMEOUT_S)
            assert not isinstance(outcome, str), f"rank {rank} failed:\n{outcome}"
            outputs = outcome or outputs
        assert outputs is not None
        return outputs
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def _rank(
    config: EngineConfig, requests: Sequence[GenerateRequest], backend: Any, rank: int, port: int, results: Any
) -> None:
    try:
        tp = join_group(
            rank=rank,
            size=config.tensor_parallel_size,
            device="cpu",
            replica_id=f"test-{port}",
            master_address="127.0.0.1",
            master_port=port,
            same_host=True,
            backend=backend,
            exchange=native_exchange(),
        )
        runner = build_runner(config, tp)
        runner.allocate_kv_cache()
        outputs = None
        if rank == 0:
            core = EngineCore(config, runner, tp)
            core.heartbeat()
            outputs = run_requests(core, requests)
            core.shutdown()
        else:
            run_follower(runner, tp)
        # An answer would wait for it, more than a second of CPU time on each rank.
        assert "torch._dynamo" not in sys.modules, "a step has imported torch's compiler"
        # No rank leaves while another may still read from it.
        results.put((rank, outputs))
        tp.close()
    except BaseException:
        results.put((rank, traceback.format_exc()))
