"""Kernels for CPUs in C++: how they are compiled, packaged and loaded. Which kernels there are is known to their callers."""
