"""What is wrong with the machines of a cluster, and what to do about it."""
