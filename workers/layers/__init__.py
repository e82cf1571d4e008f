"""The layers of the model: each knows which part of its weights belongs to this rank."""
