"""Triton's interpreter runs kernels on CPU tensors, one program at a time; tests/conftest.py turns it on. What it does to bfloat16 is
corrected here: it keeps it as integers, multiplies those in `tl.dot`, and cuts off digits where a GPU rounds to nearest even. Two steps
that take half of its time are left out.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET must be set before Triton is imported: tests/conftest.py does"

Builder, TensorHandle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_cast, _dot, _patch_lang = Builder.cast_impl, Builder.create_dot, interpreter._patch_lang
_patched: set[int] = set()


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(x: TensorHandle) -> TensorHandle:
    bits = np.ascontiguousarray(x.data).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return TensorHandle(np.where(np.isnan(x.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _cast_bfloat16_exactly(self: Builder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    if src.dtype.scalar == tl.bfloat16:
        return _cast(self, _widened(src), dst_type)
    if dst_type.scalar == tl.bfloat16:
        return _rounded(_cast(self, src, tl.float32))
    return _cast(self, src, dst_type)


def _dot_in_float32(self: Builder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
    return _dot(self, _widened(a), _widened(b), *rest)


def _patch_once(function: Callable[..., object]) -> interpreter._LangPatchScope:
    """Leaves Triton's language patched. Otherwise each kernel, and each function that it calls, patches it again: a quarter of the time."""
    key = id(function.__globals__)
    if key not in _patched:
        _patched.add(key)
        _patch_lang(function)
    return interpreter._LangPatchScope()  # what to undo after the kernel: nothing


def install() -> None:
    """For this process; a second call changes nothing."""
    Builder.cast_impl, Builder.create_dot = _cast_bfloat16_exactly, _dot_in_float32
    interpreter._patch_lang = _patch_once
    # Checks each sum of indices again in 64 bits: another quarter.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
