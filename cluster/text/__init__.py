"""Between text and token ids: tokenizers, chat templates, grammars, incremental detokenization, stop strings, tool calls."""
