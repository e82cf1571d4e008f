"""One file an endpoint, and the table of them all."""
