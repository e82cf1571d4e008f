"""The paged KV cache: blocks and their reference counts, the prefix cache, and the tensors."""
