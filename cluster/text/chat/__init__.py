"""From a conversation to token ids: chat templates."""
