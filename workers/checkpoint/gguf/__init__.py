"""The header of a GGUF file: its metadata as a ModelConfig, its tensors' types and places. No weights, see weights/gguf."""
