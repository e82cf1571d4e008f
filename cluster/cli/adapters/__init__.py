"""`tramontane adapters`: the commands, and the adapters that `serve` starts with."""
