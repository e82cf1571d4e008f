"""Tools a model may call: their definitions, the grammar of an answer that may call them, and call ids as Mistral's templates require.

Knows Mistral's format of calls: [TOOL_CALLS] and a JSON list of names and arguments. Does not know chat templates (chat/) or how calls
are read from the output (calls.py).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.text.grammar.compiler import JSON_OPTIONS, GrammarCompiler, wrap
from cluster.text.grammar.errors import GrammarError
from cluster.text.grammar.json_schema import check_divisors, moved
from cluster.text.tools.calls import TOOL_CALL_ID_CHARS
from workers.errors import RequestError

MAX_PARALLEL_CALLS = 16
MAX_TOOLS_CHARS = 400_000  # of all their schemas together
ANY_OBJECT: dict[str, Any] = {"type": "object"}
_MISTRAL_ID = re.compile(rf"[a-zA-Z0-9]{{{TOOL_CALL_ID_CHARS}}}")


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """parameters: the JSON schema of an object. strict: a schema that cannot be enforced is rejected instead of ignored."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in an assistant message. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


def mistral_id(call_id: str) -> str:
    """The id itself if it has 9 letters and digits, otherwise 9 derived from it, so that a call and its result still match."""
    if _MISTRAL_ID.fullmatch(call_id):
        return call_id
    digest = hashlib.blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return digest[:TOOL_CALL_ID_CHARS]


def tool_grammar(
    tools: Sequence[ToolDefinition],
    *,
    compiler: GrammarCompiler,
    required: bool = False,
    name: str | None = None,
    parallel: bool = True,
    text: str | None = None,
) -> str:
    """The grammar of an answer that is text or calls.

    required: only calls. name: exactly one call of that tool. parallel: up to 16 calls, otherwise exactly one. Arguments follow each
    tool's schema. text: the compiled grammar that the text follows; None for any text. If llguidance cannot enforce a schema, the
    arguments may be any object, unless the tool is strict. May run in a thread. Raises RequestError for param "tools".
    """
    token_id = compiler.tokenizer.tool_calls_token_id
    if token_id is None:
        raise RequestError(
            "This model cannot call tools: its vocabulary has no [TOOL_CALLS].",
            remedy="Remove 'tools' from the request.",
            param="tools",
        )
    schemas = {tool.name: _parameters(tool, compiler) for tool in tools if name in (None, tool.name)}
    assert schemas, f"no tool to call; requested {name!r}"
    if sum(len(json.dumps(schema)) for schema in schemas.values()) > MAX_TOOLS_CHARS:
        raise RequestError(
            f"The schemas of the tools have more than {MAX_TOOLS_CHARS:,} characters in total.",
            remedy="Use fewer tools, or smaller schemas.",
            param="tools",
        )
    calls = _calls_schema(schemas, max_calls=MAX_PARALLEL_CALLS if parallel and name is None else 1)
    start = f'<[{token_id}]> " "? @body'
    if required or name is not None:
        grammar = wrap({"json_schema": calls}, start=start)
    elif text is None:
        # Text never contains a control token, so TEXT ends where the calls start.
        grammar = wrap({"json_schema": calls}, start=f"TEXT | {start}\nTEXT: /(?s:.*)/")
    else:
        grammar = _text_or_calls(text, calls, token_id=token_id)
    try:
        check_divisors(calls)
        compiler.check(grammar)
    except GrammarError as e:
        raise RequestError(f"tools: {e.message}", remedy=e.remedy, param="tools") from None
    return grammar


def _text_or_calls(text: str, calls: dict[str, Any], *, token_id: int) -> str:
    """The grammar of a text that follows the compiled grammar `text`, or of calls. The text's own start refers to its own body."""
    first, *others = json.loads(text)["grammars"]
    start = json.loads(wrap({}, start=f'@text | <[{token_id}]> " "? @calls'))["grammars"][0]
    named = [{"name": "text", **first}, *others, {"name": "calls", "json_schema": calls}]
    return json.dumps({"grammars": [start, *named]})


def _parameters(tool: ToolDefinition, compiler: GrammarCompiler) -> dict[str, Any]:
    """The schema that the tool's arguments must follow, as llguidance is to enforce it."""
    schema = dict(tool.parameters)
    if schema.setdefault("type", "object") != "object":
        raise RequestError(
            f"tools: the parameters of {tool.name!r} are not a schema of an object.",
            remedy="Set their 'type' to 'object'.",
            param="tools",
        )
    try:
        normalized = compiler.normalized(schema)
        compiler.check(wrap({"json_schema": normalized | {"x-guidance": JSON_OPTIONS}}))
    except GrammarError as e:
        if tool.strict:
            raise RequestError(
                f"tools: {tool.name!r} is strict, but its schema cannot be enforced: {e.message}",
                remedy=e.remedy,
                param="tools",
            ) from None
        return ANY_OBJECT
    return {key: value for key, value in normalized.items() if key != "$schema"}


def _calls_schema(schemas: dict[str, dict[str, Any]], *, max_calls: int) -> dict[str, Any]:
    """The JSON schema of a list of calls. Each tool's schema moves under $defs, and its references are adjusted."""
    definitions = {f"t{i}": moved(schema, f"#/$defs/t{i}") for i, schema in enumerate(schemas.values())}
    items = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/t{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, name in enumerate(schemas)
    ]
    calls = {"type": "array", "items": {"anyOf": items}, "minItems": 1, "maxItems": max_calls, "$defs": definitions}
    return calls | {"x-guidance": JSON_OPTIONS}
