"""Load on an OpenAI-compatible server and what it says about the server: workloads, streams, statistics, reports.

Knows HTTP's words only through `transport`, which the command supplies; knows no server of any kind, ours included.
"""
