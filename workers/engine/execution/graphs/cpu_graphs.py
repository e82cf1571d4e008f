"""Graphs of decode steps on the CPU: one call of the compiled kernels instead of one for each. See cuda_graphs.py for when they are made.

A step is recorded while it runs on torch's tensors. What torch itself computes in it (looking up rows, copying, widening to float32) is
replaced by a kernel that gives the same bits; anything else that torch would compute makes the step impossible to record. Knows no batch
and no model.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from workers.engine.execution.graphs.cuda_graphs import Step
from workers.engine.execution.graphs.decode_padding import CapturePolicy
from workers.native.calls import (
    Interruption,
    RecordedCall,
    Temporaries,
    make_program,
    recorded_calls,
    runner_of,
)
from workers.native.library import NativeLibrary
from workers.native.matrices import DTYPE_NAMES
from workers.parallel.group import TensorParallel
from workers.parallel.shared_memory import SharedMemoryGroup
from workers.parallel.timed import TimedGroup

# Of temporaries while a step is recorded. Only what is written takes memory, and only until the end of the recording.
ARENA_BYTES = 1 << 30

_aten = torch.ops.aten
_NEW = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_VIEWS = {
    *(_aten.view.default, _aten._unsafe_view.default, _aten.alias.default, _aten.detach.default, _aten.t.default),
    *(_aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten.split_with_sizes.default),
    *(_aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default, _aten.transpose.int, _aten.as_strided.default),
}
_POINTERS = [ctypes.c_void_p] * 3
_SIZE = ctypes.c_int64


class NativeGraphRecorder:
    """See `GraphRecorder`. All graphs share one piece of memory for what is temporary in a step.

    Every row costs something, so no batch is padded. A step may take a second, so only sizes that come often are recorded.
    """

    policy = CapturePolicy(every_size=True, num_steps_before=8, when_idle=False)

    def __init__(self, library: NativeLibrary, tp: TensorParallel) -> None:
        self._tp = tp
        self._gather = library.function("gather_rows", [*_POINTERS, *[_SIZE] * 4])
        self._copy = library.function("copy_bytes", [*_POINTERS[:2], _SIZE])
        self._widen = library.function("widen", [*_POINTERS[:2], _SIZE])
        self._run = library.function("run_calls", [ctypes.c_void_p, _SIZE, ctypes.c_void_p], restype=_SIZE)
        self._add_bias = {
            dtype: library.function(f"add_bias_{name}", [*_POINTERS, _SIZE, _SIZE])
            for dtype, name in DTYPE_NAMES.items()
        }
        self._scale_rows = {
            dtype: library.function(f"scale_rows_{name}", [*_POINTERS[:2], _SIZE, _SIZE, _SIZE])
            for dtype, name in DTYPE_NAMES.items()
        }
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, steps: Iterable[Step]) -> int:
        return 0

    def record(self, step: Step) -> Step:
        arena = torch.empty(ARENA_BYTES, dtype=torch.uint8)
        temporaries = Temporaries(arena.data_ptr(), ARENA_BYTES)
        with recorded_calls() as calls:
            recorder = _Recorder(self, arena, temporaries)
            with _collectives(self._tp, calls, recorder), recorder:
                step()
        program = make_program(calls, temporaries)
        if self._memory.numel() < program.num_bytes:
            # Graphs that were recorded before keep theirs.
            self._memory = torch.empty(max(program.num_bytes, 2 * self._memory.numel()), dtype=torch.uint8)
        group = _compiled_group(self._tp)
        interruption = None if group is None else Interruption(group.state.pending_address, group.check)
        return runner_of(
            self._run, program, start=self._memory.data_ptr(), keep=(self._memory, group), interruption=interruption
        )

    def gather(self, table: torch.Tensor, indices: torch.Tensor, new: Callable[..., torch.Tensor]) -> torch.Tensor:
        _require(
            table.is_contiguous() and indices.is_contiguous() and indices.dtype == torch.int64, "rows of any layout"
        )
        row = table.shape[1:]
        out = new((*indices.shape, *row), table.dtype)
        row_bytes = out.element_size() * (out.numel() // indices.numel())
        self._gather(
            out.data_ptr(), table.data_ptr(), indices.data_ptr(), indices.numel(), row_bytes, 0, table.shape[0]
        )
        return out

    def add_bias(self, x: torch.Tensor, bias: torch.Tensor, new: Callable[..., torch.Tensor]) -> torch.Tensor:
        fits = x.dtype == bias.dtype and x.dtype in self._add_bias and x.dim() == 2 and bias.shape == x.shape[1:]
        _require(fits and x.is_contiguous() and bias.is_contiguous(), "sums of any shape")
        out = new(x.shape, x.dtype)
        self._add_bias[x.dtype](out.data_ptr(), x.data_ptr(), bias.data_ptr(), *x.shape)
        return out

    def scale(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """In place. x: [n, num_heads, head_dim], rows of any stride; factors: [n, 1, 1]."""
        heads_lie_together = x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]
        is_one_per_row = factors.shape == (len(x), 1, 1) and factors.dtype == torch.float32 and factors.is_contiguous()
        _require(heads_lie_together and is_one_per_row and x.dtype in self._scale_rows, "products of any shape")
        self._scale_rows[x.dtype](x.data_ptr(), factors.data_ptr(), len(x), x.shape[1] * x.shape[2], x.stride(0))
        return x

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        # Python's `x[...] *= y` ends with such a copy.
        if (target.data_ptr(), target.stride(), target.dtype) == (source.data_ptr(), source.stride(), source.dtype):
            return target
        _require(target.is_contiguous() and target.shape == source.shape, "copies of any layout")
        if not source.is_contiguous():
            # Logits of a vocabulary that the ranks do not divide evenly: each row ends with padding.
            _require(source.dim() == 2 and source.stride(1) == 1, "copies of any layout")
            for i in range(len(source)):
                self.copy(target[i], source[i])
            return target
        if target.dtype == source.dtype:
            self._copy(target.data_ptr(), source.data_ptr(), target.nbytes)
        else:
            _require((source.dtype, target.dtype) == (torch.bfloat16, torch.float32), "conversions")
            self._widen(target.data_ptr(), source.data_ptr(), target.numel())
        return target


class _Recorder(TorchDispatchMode):
    """Gives temporaries their addresses, and replaces what torch would compute. RuntimeError: it cannot."""

    def __init__(self, kernels: NativeGraphRecorder, arena: torch.Tensor, temporaries: Temporaries) -> None:
        super().__init__()
        self._kernels = kernels
        self._arena = arena
        self._temporaries = temporaries

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own hook. If True, the first operator imports torch's compiler: 900 modules, 1.5 s of CPU time on each rank, in the
        middle of the first answer.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VIEWS:
            return func(*args, **kwargs)
        if func in _NEW:
            like = func(*args, **kwargs)  # torch takes no memory until something is written
            _require(like.is_contiguous(), "temporaries of any layout")
            return self.new(like.shape, like.dtype)
        if func is _aten.embedding.default:
            return self._kernels.gather(args[0], args[1], self.new)
        if func is _aten.index.Tensor and len(args[1]) == 1:
            return self._kernels.gather(args[0], args[1][0], self.new)
        if func is _aten.add.Tensor and not kwargs and isinstance(args[1], torch.Tensor):
            return self._kernels.add_bias(args[0], args[1], self.new)
        if func is _aten.mul_.Tensor and isinstance(args[1], torch.Tensor):
            return self._kernels.scale(args[0], args[1])
        if func is _aten.copy_.default:
            return self._kernels.copy(args[0], args[1])
        if func is _aten._to_copy.default and kwargs.get("dtype") == torch.float32:
            return self._kernels.copy(self.new(args[0].shape, torch.float32), args[0])
        # In inference mode, torch passes what is made of other operators undivided.
        with self:
            result = func.decompose(*args, **kwargs)
        _require(result is not NotImplemented, f"torch for {func}")
        return result

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        address = self._temporaries.take(num_bytes)
        if address is None:
            raise RuntimeError(f"it needs more than {ARENA_BYTES >> 30} GiB of temporaries")
        start = address - self._arena.data_ptr()
        return self._arena[start : start + num_bytes].view(dtype).view(shape)


@contextlib.contextmanager
def _collectives(tp: TensorParallel, calls: list[RecordedCall], recorder: "_Recorder") -> Iterator[None]:
    """The group's collectives in a step, recorded as calls of Python with the same tensors elsewhere. Compiled ones are calls like any."""
    if tp.size == 1 or _compiled_group(tp) is not None:
        yield
        return
    all_reduce, gather = tp.all_reduce, tp.gather
    own: dict[str, Any] = {name: vars(tp)[name] for name in ("all_reduce", "gather") if name in vars(tp)}

    def record(run: Callable[..., Any], *tensors: torch.Tensor) -> None:
        kinds = [(x.shape, x.dtype) for x in tensors]

        def make(*addresses: int) -> Callable[[], None]:
            placed = [_tensor_at(address, *kind) for address, kind in zip(addresses, kinds, strict=True)]
            return lambda: run(*placed)

        with _disable_current_modes():
            run(*tensors)
        calls.append(RecordedCall(0, tuple(x.data_ptr() for x in tensors), python=make))

    def add_up(x: torch.Tensor) -> None:
        total = all_reduce(x)
        if total is not x:
            x.copy_(total)

    def recorded_all_reduce(x: torch.Tensor) -> torch.Tensor:
        record(add_up, x)
        return x

    def recorded_gather(x: torch.Tensor) -> torch.Tensor | None:
        if tp.rank != 0:
            record(gather, x)
            return None
        with _disable_current_modes():
            whole = recorder.new((*x.shape[:-1], x.shape[-1] * tp.size), x.dtype)
        record(lambda x, whole: whole.copy_(gather(x)), x, whole)
        return whole

    recorded: dict[str, Any] = {"all_reduce": recorded_all_reduce, "gather": recorded_gather}
    own_attributes: dict[str, Any] = vars(tp)
    own_attributes.update(recorded)
    try:
        yield
    finally:
        for name in recorded:
            del own_attributes[name]
        own_attributes.update(own)


def _compiled_group(tp: TensorParallel) -> SharedMemoryGroup | None:
    group = tp.shared_memory if isinstance(tp, TimedGroup) else tp
    return group if isinstance(group, SharedMemoryGroup) and group.is_compiled else None


def _tensor_at(address: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    buffer = (ctypes.c_uint8 * (shape.numel() * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _require(fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise RuntimeError(f"it needs {what}")
