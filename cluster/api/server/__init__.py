"""HTTP itself: listener, authentication, bodies, errors, event streams, limits."""
