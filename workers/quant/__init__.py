"""The forms in which a weight matrix is kept and multiplied, one file each."""
