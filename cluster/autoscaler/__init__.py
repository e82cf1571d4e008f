"""How many replicas there should be: pure functions of observations."""
