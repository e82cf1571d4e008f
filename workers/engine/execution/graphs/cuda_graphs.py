"""CUDA graphs of decode steps: one launch instead of hundreds. How a step is captured, and which sizes have a graph.

A graph is captured while the engine serves already, one between two steps, and replays the kernels that the step without it launches: no
bit of an answer changes. What a step computes, its caller passes as a function. Knows no batch and no model.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from workers.engine.execution.graphs.decode_padding import CapturePolicy, next_to_capture

log = logging.getLogger(__name__)

# What the driver keeps of one graph besides the memory of its tensors. An estimate, for some 500 kernels.
DRIVER_BYTES_PER_GRAPH = 8 << 20

# Computes from and into tensors that stay where they are.
Step = Callable[[], None]


class GraphRecorder(Protocol):
    """Makes a function that repeats a step."""

    @property
    def policy(self) -> CapturePolicy: ...

    def reserve(self, steps: Iterable[Step]) -> int:
        """Runs all steps that will be recorded, to take their memory. Returns the bytes that their graphs need besides what the device then
        shows as allocated.
        """
        ...

    def record(self, step: Step) -> Step:
        """Runs the step and captures it. Raises RuntimeError if it cannot be captured."""
        ...


class CudaGraphRecorder:
    """See `GraphRecorder`. All graphs share one pool of memory: they never run at the same time, and leave nothing in it."""

    policy = CapturePolicy()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.MemPool()
        self._stream = torch.cuda.Stream(device)

    def reserve(self, steps: Iterable[Step]) -> int:
        before = self._unused_bytes()
        num_graphs = 0
        for step in steps:
            self._warm_up(step)
            num_graphs += 1
        torch.cuda.synchronize(self._device)
        return self._unused_bytes() - before + num_graphs * DRIVER_BYTES_PER_GRAPH

    def record(self, step: Step) -> Step:
        self._warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with self._own_stream():
            # Other threads, such as NCCL's watchdog, go on using the device.
            graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]  # torch's own pair
            try:
                step()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay

    def _warm_up(self, step: Step) -> None:
        """Loads kernels and allocates workspaces, which must not happen in a capture."""
        with self._own_stream(), torch.cuda.use_mem_pool(self._pool, device=self._device):
            step()

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """A capture needs a stream of its own. It takes its place between the steps on the usual stream."""
        usual = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            yield
        usual.wait_stream(self._stream)

    def _unused_bytes(self) -> int:
        stats = torch.cuda.memory_stats(self._device)
        return stats["reserved_bytes.all.current"] - stats["allocated_bytes.all.current"]


class DecodeGraphs:
    """The graphs of one rank, by their number of sequences. `recorder` None: there are none."""

    def __init__(self, sizes: Sequence[int], recorder: GraphRecorder | None) -> None:
        self.sizes = sizes
        self._recorder = recorder
        self._replays: dict[int, Step] = {}

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self._replays))

    def reserve(self, step_of: Callable[[int], Step]) -> int:
        """See `GraphRecorder`. The largest size comes first, so that all others find room in its memory."""
        if self._recorder is None:
            return 0
        return self._recorder.reserve(step_of(size) for size in reversed(self.sizes))

    def next_size(self, wanted: int | None) -> int | None:
        """See `next_to_capture`."""
        if self._recorder is None:
            return None
        return next_to_capture(self.sizes, self._replays, wanted=wanted)

    def capture(self, size: int, step: Step, *, agree: Callable[[bool], bool]) -> None:
        """Every rank calls it for the same size. `agree`: whether all ranks pass True. If one fails, no rank tries again."""
        assert self._recorder is not None, "no graph is asked for where there are none"
        replay, failure = None, "another rank could not capture it"
        try:
            replay = self._recorder.record(step)
        except RuntimeError as e:  # torch's one class for all that CUDA refuses
            failure = str(e).splitlines()[0]
        if agree(replay is not None):
            assert replay is not None
            self._replays[size] = replay
            return
        self._recorder = None
        log.warning(
            "Decode steps of %s sequences stay without a graph, as do those without one so far: %s.", size, failure
        )

    def replay(self, size: int) -> bool:
        """Runs the step of this size as a graph. False if there is none: nothing has run."""
        replay = self._replays.get(size)
        if replay is not None:
            replay()
        return replay is not None
