"""Turns output token ids into text: detokenizer, stop strings, tool calls."""
