"""The loop of ranks 1 and up: receive a batch, compute it, again. No requests, no policy, no clock."""

from workers.engine.batch import ForwardBatch, is_stop
from workers.engine.model_runner import ModelRunner
from workers.parallel.group import TensorParallel


def run_follower(runner: ModelRunner, tp: TensorParallel) -> None:
    """Returns when rank 0 says stop. Raises GroupError when rank 0 is gone or a collective times out."""
    while not is_stop(message := tp.broadcast(None)):
        runner.execute(ForwardBatch.unpack(message))
