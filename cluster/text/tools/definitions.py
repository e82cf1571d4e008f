"""Tools a model may call: their definitions, the grammar of an answer that may call them, and call ids as Mistral's templates require.

Knows the formats of calls: [TOOL_CALLS] and a JSON list of names and arguments; for each call, [TOOL_CALLS], its name, [ARGS] and its
arguments (named_calls.py); or tags around an object with both (tagged_calls.py). Does not know chat templates (chat/) or how calls are
read from the output.
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
from cluster.text.tokenizer import Tokenizer
from cluster.text.tools.calls import TOOL_CALL_ID_CHARS, CallFormat
from cluster.text.tools.named_calls import ARGS, CALL_ID, CALLS
from cluster.text.tools.tagged_calls import CLOSE, OPEN
from workers.errors import RequestError

MAX_PARALLEL_CALLS = 16
MAX_TOOLS_CHARS = 400_000  # of all their schemas together
ANY_OBJECT: dict[str, Any] = {"type": "object"}
_ANY_TEXT = "/(?s:.*)/"
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
    call_format: CallFormat = "list",
) -> str:
    """The grammar of an answer that is text or calls.

    required: only calls. name: exactly one call of that tool. parallel: up to 16 calls, otherwise exactly one. Arguments follow each
    tool's schema. text: the compiled grammar that the text follows; None for any text. If llguidance cannot enforce a schema, the
    arguments may be any object, unless the tool is strict. May run in a thread. Raises RequestError for param "tools".
    """
    token_id = compiler.tokenizer.tool_calls_token_id
    if token_id is None and call_format != "tags":
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
    max_calls = MAX_PARALLEL_CALLS if parallel and name is None else 1
    write = {"list": _calls_in_list, "names": _calls_by_name, "tags": _calls_in_tags}[call_format]
    calls = write(schemas, compiler.tokenizer, max_calls)
    if required or name is not None:
        grammar = _grammar(calls.start, calls.parts)
    elif text is None:
        grammar = _grammar(f"TEXT | {calls.start}\nTEXT: {calls.text}", calls.parts)
    else:
        # The grammar of the text is a list of its own, whose first member refers to its second as @body.
        first, *others = json.loads(text)["grammars"]
        grammar = _grammar(f"@text | {calls.start}", [{"name": "text", **first}, *others, *calls.parts])
    try:
        for part in calls.parts:
            check_divisors(part["json_schema"])
        compiler.check(grammar)
    except GrammarError as e:
        raise RequestError(f"tools: {e.message}", remedy=e.remedy, param="tools") from None
    return grammar


@dataclass(frozen=True, slots=True)
class _Calls:
    """start: of a grammar, in Lark; parts: what it refers to by name, each with a JSON schema.

    text: a terminal for text without calls. It never contains a control token, so it ends where calls that start with one do.
    """

    start: str
    parts: list[dict[str, Any]]
    text: str = _ANY_TEXT


def _grammar(start: str, parts: Sequence[dict[str, Any]]) -> str:
    first = json.loads(wrap({}, start=start))["grammars"][0]
    return json.dumps({"grammars": [first, *parts]})


def _calls_in_list(schemas: dict[str, dict[str, Any]], tokenizer: Tokenizer, max_calls: int) -> _Calls:
    schema = _calls_schema(schemas, max_calls=max_calls)
    return _Calls(f'<[{tokenizer.tool_calls_token_id}]> " "? @calls', [{"name": "calls", "json_schema": schema}])


def _calls_in_tags(schemas: dict[str, dict[str, Any]], tokenizer: Tokenizer, max_calls: int) -> _Calls:
    """White space around the tags is as Hermes writes it, or none."""
    first, last = _tag(OPEN, tokenizer), _tag(CLOSE, tokenizer)
    schema = _calls_schema(schemas, max_calls=1)
    call = schema.pop("items")
    call |= {key: schema[key] for key in ("$defs", "x-guidance")}
    start = f"WS call{{1,{max_calls}}}\ncall: {first} WS @call_object WS {last} WS\nWS: /[ \\n]{{0,2}}/"
    return _Calls(start, [{"name": "call_object", "json_schema": call}], f"{_ANY_TEXT} & ~/(?s:.*){OPEN}(?s:.*)/")


def _tag(tag: str, tokenizer: Tokenizer) -> str:
    """In Lark: text, or the token that the checkpoint has added for it, which the vocabulary's file may not know."""
    if tag not in tokenizer.special_tokens:
        return json.dumps(tag)
    token = f"<[{tokenizer.special_tokens[tag].id}]>"
    return token if tokenizer.control_token_id(tag) is not None else f"({json.dumps(tag)} | {token})"


def _calls_by_name(schemas: dict[str, dict[str, Any]], tokenizer: Tokenizer, max_calls: int) -> _Calls:
    """An id between name and arguments, as v11 writes them, is allowed where the vocabulary has its token."""
    calls, call_id, args = (tokenizer.control_token_id(name) for name in (CALLS, CALL_ID, ARGS))
    assert args is not None, "a template with calls by name needs [ARGS]"
    an_id, ids = (
        ("", "") if call_id is None else (f"(<[{call_id}]> ID)? ", f"\nID: /[a-zA-Z0-9]{{{TOOL_CALL_ID_CHARS}}}/")
    )
    each = [f"<[{calls}]> {json.dumps(name)} {an_id}<[{args}]> @t{i}" for i, name in enumerate(schemas)]
    rules = f"call{{1,{max_calls}}}\ncall: {' | '.join(each)}{ids}"
    return _Calls(
        rules,
        [{"name": f"t{i}", "json_schema": s | {"x-guidance": JSON_OPTIONS}} for i, s in enumerate(schemas.values())],
    )


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
