"""Kernels run in Triton's interpreter on the CPU."""

from support import triton_interpreter

triton_interpreter.install()
