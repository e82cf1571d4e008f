"""Decode steps that repeat as one launch: in which sizes they come, and how they are captured on CUDA and on the CPU."""
