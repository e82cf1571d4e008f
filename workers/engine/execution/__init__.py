"""A batch through the model on one rank: the runner, graphs of decode steps, and which bits a replica computes."""
