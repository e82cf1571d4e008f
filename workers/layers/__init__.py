"""Layers that know which slice of a weight is theirs."""
