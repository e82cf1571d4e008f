"""The controller: one detached Ray actor that starts, watches, drains and replaces replicas."""
