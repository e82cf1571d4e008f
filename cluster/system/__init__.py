"""Helpers around the operating system that know nothing of Tramontane."""
