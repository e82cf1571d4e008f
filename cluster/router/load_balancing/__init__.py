"""The replicas a router has, in numbers, and the choice of one for each request."""
