"""LoRA adapters beside the base model: PEFT folders, this rank's slices on the host, slots on the device, and which adapter has a slot."""
