"""From a body's bytes to its struct: what is too deep, what is wrong, and which fields cannot act."""
