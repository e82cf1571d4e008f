"""The paged KV cache: blocks, who holds them, their content, the tensors."""
