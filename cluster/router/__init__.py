"""Between the HTTP surface and the replicas: which replica serves a request, and its stream of tokens."""
