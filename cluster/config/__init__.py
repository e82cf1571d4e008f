"""Settings as frozen values."""
