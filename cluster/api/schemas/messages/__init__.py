"""Bodies, answers and events of /v1/messages."""
