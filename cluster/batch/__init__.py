"""Batches: many requests in one file, each answered exactly once even if processes die. Knows no HTTP, no Ray and no torch."""
