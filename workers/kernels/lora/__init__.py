"""LoRA's product in a linear layer, out += scale * B (A x) for rows with an adapter: compiled for CPUs, Triton, and plain torch."""
