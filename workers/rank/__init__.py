"""One process of a replica: its life, its engine thread, its socket."""
