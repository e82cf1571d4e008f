"""From facts to findings: pure functions."""
