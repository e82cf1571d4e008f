"""Products with weights of 8 or 4 bits on a GPU: how they are laid out, what is computed from them, and the Triton forms of that."""
