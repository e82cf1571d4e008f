"""The loop of ranks 1 and up: receive a batch, compute it, repeat; when rank 0 says so, capture a CUDA graph, put an adapter into its slot
or record a profile.

No requests, no policy.
"""

import time
from collections.abc import Callable

from workers.engine.batch import ForwardBatch, adapter_to_put, is_stop, profile_begins, size_to_capture
from workers.engine.execution.model_runner import ModelRunner
from workers.parallel.group import TensorParallel


def run_follower(
    runner: ModelRunner,
    tp: TensorParallel,
    on_step: Callable[[float], None] = lambda _: None,
    *,
    on_profile: Callable[[bool], None] = lambda _: None,
) -> None:
    """Returns when rank 0 says stop. Raises GroupError when rank 0 is gone or a collective times out.

    `on_step` gets each step's seconds on the host, without the wait for rank 0. `on_profile` gets True when steps are recorded from now
    on, False when no longer.
    """
    while not is_stop(message := tp.broadcast(None)):
        size = size_to_capture(message)
        if size is not None:
            runner.capture(size)
            continue
        if (begins := profile_begins(message)) is not None:
            on_profile(begins)
            continue
        if (adapter := adapter_to_put(message)) is not None:
            runner.put_adapter(*adapter)
            continue
        began = time.monotonic()
        runner.execute(ForwardBatch.unpack(message))
        on_step(time.monotonic() - began)
