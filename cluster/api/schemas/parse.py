"""From a body's bytes to its struct, and what is said when it does not fit: one sentence, naming the field to change.

Knows which of OpenAI's parameters this server does not act on: they are refused by name unless their value asks for nothing, as are
fields it has never heard of. Knows no endpoint.
"""

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from cluster.api.schemas.chat import ChatRequest
from cluster.api.schemas.completions import CompletionRequest
from workers.errors import RequestError

MAX_DEPTH = 64  # of lists and objects in each other; a JSON schema of a person's making has a dozen

# OpenAI's parameters that this server does not act on, and the values that ask for nothing.
_COMMON: dict[str, tuple[Any, ...]] = {
    "metadata": (None, {}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
}
UNSUPPORTED: dict[type[msgspec.Struct], dict[str, tuple[Any, ...]]] = {
    CompletionRequest: _COMMON,
    ChatRequest: {
        **_COMMON,
        "functions": (None, []),
        "function_call": (None, "none"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
    },
}

RequestT = TypeVar("RequestT", bound=msgspec.Struct)
_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_MISSING_FIELD = re.compile(r"missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """The validated request. Raises RequestError naming the field."""
    try:
        fields = msgspec.json.decode(body)
    except RecursionError as e:
        raise _too_deep() from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RequestError(f"The request body is not valid JSON: {e}.", code="invalid_json") from e
    if not isinstance(fields, dict):
        raise RequestError("The request body must be a JSON object.", code="invalid_json")
    check_depth(fields)
    for name, neutral in UNSUPPORTED.get(kind, {}).items():
        if name in fields and fields.pop(name) not in neutral:
            raise RequestError(
                f"{name!r} is not supported by this server; leave it out.", param=name, code="unsupported_parameter"
            )
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except (msgspec.ValidationError, OverflowError) as e:
        raise _explain(str(e)) from e


def check_depth(value: object, max_depth: int = MAX_DEPTH) -> None:
    """Raises RequestError for lists and objects nested deeper than `max_depth`. Without recursion, level by level."""
    level = [value]
    for _ in range(max_depth):
        level = [child for container in level for child in _children(container) if isinstance(child, dict | list)]
        if not level:
            return
    raise _too_deep()


def _children(container: object) -> Iterable[object]:
    return container.values() if isinstance(container, dict) else container if isinstance(container, list) else ()


def _too_deep() -> RequestError:
    return RequestError(
        f"The request body nests lists and objects deeper than {MAX_DEPTH} levels; flatten it.", code="invalid_json"
    )


def _explain(message: str) -> RequestError:
    at = _AT.search(message)
    path = at[1].replace("[...]", "") if at else ""
    param = re.split(r"[.\[]", path)[0] or None
    if unknown := _UNKNOWN_FIELD.search(message):
        name = f"{path}.{unknown[1]}" if path else unknown[1]
        return RequestError(
            f"Unrecognized request argument supplied: {name}", param=param or unknown[1], code="unknown_parameter"
        )
    if missing := _MISSING_FIELD.search(message):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"You must provide {name!r}.", param=param or missing[1], code="missing_required_parameter")
    what = message[: at.start()] if at else message
    what = what[:1].lower() + what[1:]
    if path.endswith(".role"):
        what += "; use 'system', 'developer', 'user', 'assistant' or 'tool'"
    elif path.endswith("response_format.type"):
        what += "; use 'text', 'json_object' or 'json_schema'"
    elif re.search(r"content\[\d+\]\.type$", path):
        what += "; only parts of type 'text' are supported"
    return RequestError(f"Invalid value for {path or 'the request'!r}: {what}.", param=param, code="invalid_value")
