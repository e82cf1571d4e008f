"""Fields that request output of a certain form: OpenAI's `response_format` and vLLM's `structured_outputs`.

Knows their forms only; cluster/api/generation/structured.py reads them, cluster/text/grammar/compiler.py builds grammars from them.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

MAX_CHOICES = 4096
MAX_PATTERN_CHARS = 65_536

JsonSchema = dict[str, Any] | bool
Pattern = Annotated[str, Meta(min_length=1, max_length=MAX_PATTERN_CHARS)]
Choices = Annotated[list[str], Meta(min_length=1, max_length=MAX_CHOICES)]


class JsonSchemaFormat(Struct, frozen=True, kw_only=True):
    """The output always follows `schema`, whatever `strict` says. Without a schema, any JSON object is allowed."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    """Any JSON object; with `schema`, as llama.cpp and others write it, one that follows it."""

    schema: dict[str, Any] | None = None


class SchemaFormat(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    """JSON that follows a schema."""

    json_schema: JsonSchemaFormat


ResponseFormat = TextFormat | JsonObjectFormat | SchemaFormat


class StructuredOutputs(Struct, frozen=True, kw_only=True):
    """Exactly one of: `json`, a JSON schema, also as text; `regex` for the whole output; `choice`, a list of texts; `grammar` in Lark;
    `json_object`, true for any JSON object.
    """

    json: JsonSchema | str | None = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
