"""The command `tramontane eval`."""
