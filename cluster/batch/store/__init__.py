"""Where batches, files and leases are kept: one interface, SQLite and PostgreSQL behind it."""
