"""Batches: many requests in one file, answered exactly once each, whatever dies meanwhile. Knows no HTTP, no Ray, no torch."""
