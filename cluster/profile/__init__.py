"""Joins what several processes recorded into one file. Knows no Ray, no gateway and no torch."""
