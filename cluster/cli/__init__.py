"""The command `tramontane`: options, what each command does, and what a person reads."""
