"""Request and answer bodies as msgspec structs: one declaration validates, answers, and is the page /openapi.json."""
