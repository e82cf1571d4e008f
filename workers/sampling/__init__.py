"""The next token: sampler, log-probabilities, grammars."""
