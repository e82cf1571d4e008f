"""The files that hold a tokenizer (SentencePiece, tekken.json, tokenizer.json, GGUF): the bytes of each token, and encoding."""
