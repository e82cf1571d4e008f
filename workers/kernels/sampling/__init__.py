"""What sampling on a device computes: adjusted logits, a token of each row, log-probabilities; Triton and plain torch."""
