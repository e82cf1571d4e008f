"""What controller, gateways and commands tell each other: frozen values."""
