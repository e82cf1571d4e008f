"""Health, metrics, the routing explanation and the administration of a cluster."""
