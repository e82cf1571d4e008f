"""Tools: their definitions, and the calls a model writes."""
