"""Spans: how they are made and sent (OpenTelemetry), and those of a replica. Imports the library only where tracing is on."""
