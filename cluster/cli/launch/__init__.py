"""What the commands that start ranks share: devices, memory, the connection to Ray, and the phases until the first replica serves."""
