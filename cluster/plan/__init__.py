"""What a model needs, how fast it can be and what it costs, before anything is launched."""
