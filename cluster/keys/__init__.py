"""API keys: the file they are in, what each may do and has done. Knows no HTTP."""
