"""Where batches, files and leases are stored: one interface, with SQLite and PostgreSQL as implementations."""
