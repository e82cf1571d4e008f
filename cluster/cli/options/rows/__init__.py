"""The rows of the option table, a file for each command or a few that belong together. shared.py has those of several commands."""
