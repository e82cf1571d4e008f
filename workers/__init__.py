"""What runs next to an accelerator: model, engine, collectives. Knows nothing about HTTP, text or replicas."""
