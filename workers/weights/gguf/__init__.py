"""Weights in GGUF files: names, block formats, and tensors that are read only where they are indexed."""
