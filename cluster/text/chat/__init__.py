"""Chat templates: turn a conversation into token ids."""
