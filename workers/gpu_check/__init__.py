"""The proof that a GPU computes what the CPU specifications say, and how fast: `tramontane doctor --gpu`, `make test-gpu`.

Needs torch 2.11 or newer, msgspec and llguidance; without transformers or compute-sanitizer it says what it leaves out.
"""
