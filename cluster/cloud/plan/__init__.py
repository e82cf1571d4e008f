"""`tramontane plan`: whether a model fits on a GPU, how fast it can be there at best, what that costs, and the YAML that rents it."""
