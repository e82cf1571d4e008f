"""What `serve` is made of: the models that it was asked for, the replicas it waits for, and what it says when it is ready."""
