"""Which requests get in, how many of each tenant, and how they wait for their turn."""
