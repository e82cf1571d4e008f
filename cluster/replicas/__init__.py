"""Replicas as Ray actors: placement, start, the socket to rank 0, health."""
