"""What runs beside an accelerator: model, engine, collectives. Knows nothing of HTTP, text or replicas."""
