"""The registry of adapters: pure transitions, the choice of a revision, and where their contents are kept."""
