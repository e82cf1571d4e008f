"""Preemption notices: read them, decide what they mean, and act in time."""
