"""Endpoints for operators: health, metrics, version, the routing explanation and the administration of a cluster."""
