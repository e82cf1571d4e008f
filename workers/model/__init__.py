"""The Mistral model and the loader that fills it from a checkpoint folder."""
