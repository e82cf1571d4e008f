"""`tramontane serve`: what its platform wants of it, the models that it was asked for, and what it says when it is ready."""
