"""From a JSON schema, expression or grammar to what the engine can follow."""
