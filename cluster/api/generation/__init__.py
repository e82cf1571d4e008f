"""From a validated body to a prompt, sampling parameters and deltas of text."""
