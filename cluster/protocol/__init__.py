"""The frozen values that the controller, gateways and commands exchange."""
