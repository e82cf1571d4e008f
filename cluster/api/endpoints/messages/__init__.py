"""/v1/messages: Anthropic's API on the code of chat."""
