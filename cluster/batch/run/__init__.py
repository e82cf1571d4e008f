"""Runs batches: which lines are sent when, how each ends, and the files at the end."""
