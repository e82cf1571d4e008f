"""`plan --finetune`: what fine-tuning with LoRA needs on one GPU, by arithmetic, as examples/finetune does it."""
