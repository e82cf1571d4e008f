"""Turns JSON schemas, regular expressions and grammars into what the engine can enforce."""
