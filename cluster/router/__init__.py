"""Between the HTTP API and the replicas: chooses a replica for each request and streams its tokens."""
