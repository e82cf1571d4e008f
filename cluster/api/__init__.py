"""The OpenAI-compatible HTTP surface (aiohttp)."""
