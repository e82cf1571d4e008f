"""The control plane: HTTP, text, routing, replicas. Importing it never imports torch."""
