"""Continuous batching over a paged KV cache: scheduler, cache manager, runner, sampler, and the loop around them."""
