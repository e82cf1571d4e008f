"""API keys: the keys file, the limits of each key, and its usage. Knows no HTTP."""
