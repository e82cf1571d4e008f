"""`tramontane batch`: jobs, their folders and locations, run here or on a server."""
