"""What a model needs of a GPU, how fast it can be, and what that costs."""
