"""Paged attention: one signature, the `sdpa` specification and the CUDA kernel tested against it."""
