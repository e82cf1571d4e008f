"""Triton's interpreter runs kernels on CPU tensors, one program at a time; tests/conftest.py turns it on. Two of its ways are corrected
here. It keeps bfloat16 as integers, multiplies those in `tl.dot`, and cuts off digits where a GPU rounds to nearest even. And it leaves
`tl.dot` to BLAS, which on some processors adds up some rows of a tile in another order than others; a GPU adds up all in one. Two steps
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
_cast, _patch_lang = Builder.cast_impl, interpreter._patch_lang
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


def _dot_in_one_order(self: Builder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object) -> TensorHandle:
    """No kernel here multiplies 8-bit floats, which would have to be converted first."""
    x, y = (_widened(tile).data.astype(d.data.dtype) for tile in (a, b))
    return TensorHandle(np.einsum("...mk,...kn->...mn", x, y) + d.data, d.dtype.scalar)


def _patch_once(function: Callable[..., object]) -> interpreter._LangPatchScope:
    """Leaves Triton's language patched. Otherwise each kernel, and each function that it calls, patches it again: a quarter of the time."""
    key = id(function.__globals__)
    if key not in _patched:
        _patched.add(key)
        _patch_lang(function)
    return interpreter._LangPatchScope()  # what to undo after the kernel: nothing


def install() -> None:
    """For this process; a second call changes nothing."""
    Builder.cast_impl, Builder.create_dot = _cast_bfloat16_exactly, _dot_in_one_order
    interpreter._patch_lang = _patch_once
    # Checks each sum of indices again in 64 bits: another quarter.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
