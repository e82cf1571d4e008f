"""Responses that are stored: they run without their client, and what they generate is on the disk before anybody sees it."""
