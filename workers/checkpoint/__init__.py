"""A checkpoint folder's configuration files, read as a ModelConfig: what each field means, and what this engine refuses."""
