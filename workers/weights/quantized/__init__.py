"""Matrices of GPTQ, AWQ, compressed-tensors and fp8 checkpoints, which are several tensors each, as one source of weights each."""
