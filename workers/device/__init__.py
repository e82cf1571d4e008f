"""The device that a process computes on: which GPUs torch can use, why it can use none, and the engine sizes that fit a GPU."""
