"""The HTTP layer: listener, authentication, bodies, errors, event streams, limits."""
