"""`tramontane plan`: what it prints about serving and about fine-tuning."""
