"""What the model's layers compute: norms, rotary embedding, SiLU, the product with one tile; Triton, compiled for CPUs, plain torch."""
