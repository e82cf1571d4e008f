"""What the logits of a step come to: next tokens, what requests read from their prompts, and deltas."""
