"""Runs a batch: which lines are sent, what becomes of each, and the files at the end."""
