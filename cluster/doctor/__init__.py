"""Finds what is wrong with this machine or the nodes of a cluster, and says what to do about it."""
