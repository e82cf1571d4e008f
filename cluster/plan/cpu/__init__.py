"""Plans for a machine without a GPU: what a model needs there in each form of its weights, and how fast it can be."""
