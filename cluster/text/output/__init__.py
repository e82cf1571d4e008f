"""From token ids to text: detokenizer, stop strings, tool calls."""
