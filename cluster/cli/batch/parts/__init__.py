"""A job in parts: their records, their lines, and the merge of their answers."""
