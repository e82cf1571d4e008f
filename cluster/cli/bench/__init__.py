"""`tramontane bench`: its options, its HTTP client for streams, and where its results go."""
