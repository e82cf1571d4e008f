"""Writes tiny checkpoints in the formats of GPTQ, AWQ, compressed-tensors and fp8, each beside the dense checkpoint that it stands for.

The packers follow the formats' own descriptions, number by number, so that comparing with them proves something. They know nothing of
`workers`.
"""
