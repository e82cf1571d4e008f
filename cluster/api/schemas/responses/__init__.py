"""Bodies of /v1/responses; the response and its events are in cluster/responses."""
