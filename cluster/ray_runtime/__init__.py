"""Ray's start-up, nodes and metrics: the only place that knows its private parts."""
