"""Tensor parallelism: the process group, and layers that know which slice of a weight is theirs."""
