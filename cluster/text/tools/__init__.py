"""Tools: their definitions, and the tool calls in a model's output."""
