"""`tramontane batch`: jobs, their folders and locations, run on this machine or on a server."""
