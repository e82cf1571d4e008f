"""Records what one process does for a few engine steps. Nothing here runs, and no function is changed, until a profile is asked for."""
