"""The spans of a gateway: of requests, of their sequences, and of each attempt on a replica."""
