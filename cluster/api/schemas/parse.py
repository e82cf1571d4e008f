"""Parses a body's bytes into its struct, and explains what is wrong with them, naming the field to change.

Knows which of OpenAI's parameters this server does not support: they are refused by name, unless their value has no effect anyway.
Unknown fields are refused as well. Knows no endpoint.
"""

import re
from typing import Any, TypeVar

import msgspec
import numpy as np

from cluster.api.schemas.chat import ChatRequest
from cluster.api.schemas.completions import CompletionRequest
from workers.errors import RequestError

MAX_CONTAINERS = 100_000
MAX_VALUES = 2_000_000  # mostly token ids
MAX_DEPTH = 64  # of nested lists and objects; a hand-written JSON schema has about a dozen levels

# OpenAI's parameters that this server does not support, with the values that have no effect.
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
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """The validated request. Raises RequestError naming the field."""
    check_structure(body)
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RequestError(f"The request body is not valid JSON: {e}.", code="invalid_json") from e
    if not isinstance(fields, dict):
        raise RequestError("The request body must be a JSON object.", code="invalid_json")
    for name, neutral in UNSUPPORTED.get(kind, {}).items():
        if name in fields and fields.pop(name) not in neutral:
            raise RequestError(
                f"{name!r} is not supported by this server.",
                remedy="Remove it.",
                param=name,
                code="unsupported_parameter",
            )
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except (msgspec.ValidationError, OverflowError) as e:
        raise _explain(str(e)) from e


def check_structure(body: bytes) -> None:
    """Raises RequestError for JSON that is nested too deeply or has too many values, before any objects are made from it.

    Counts brackets and commas outside of strings, by array arithmetic that does not block other threads: about 100 ms for 8 MB. The
    result is meaningless for invalid JSON, which the decoder refuses.
    """
    codes = np.frombuffer(body, np.uint8)
    steps = _STEPS[codes]
    if not steps.any():
        return
    at = np.arange(len(codes), dtype=np.int32)
    last_other = np.maximum.accumulate(np.where(codes == ord("\\"), np.int32(-1), at))
    num_backslashes = at - 1 - np.concatenate([[np.int32(-1)], last_other[:-1]])  # right before each byte
    is_quote = (codes == ord('"')) & (num_backslashes % 2 == 0)
    outside = np.cumsum(is_quote, dtype=np.int32) % 2 == 0
    steps *= outside
    if int(steps.cumsum(dtype=np.int32).max()) > MAX_DEPTH:
        raise RequestError(
            f"The request body nests lists and objects more than {MAX_DEPTH} levels deep.",
            remedy="Flatten it.",
            code="invalid_json",
        )
    num_containers = int((steps > 0).sum())
    num_values = num_containers + int(((codes == ord(",")) & outside).sum())
    for number, most, what in (
        (num_containers, MAX_CONTAINERS, "lists and objects"),
        (num_values, MAX_VALUES, "values"),
    ):
        if number > most:
            raise RequestError(
                f"The request body has {number:,} {what}; the limit is {most:,}.",
                remedy="Split it into several requests.",
                code="request_too_large",
            )


def _explain(message: str) -> RequestError:
    at = _AT.search(message)
    path = at[1].replace("[...]", "") if at else ""
    param = re.split(r"[.\[]", path)[0] or None
    if unknown := _UNKNOWN_FIELD.search(message):
        name = f"{path}.{unknown[1]}" if path else unknown[1]
        return RequestError(
            f"Unrecognized request argument supplied: {name}.",
            remedy="Remove it, or correct its name.",
            param=param or unknown[1],
            code="unknown_parameter",
        )
    if missing := _MISSING_FIELD.search(message):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"You must provide {name!r}.", param=param or missing[1], code="missing_required_parameter")
    what = message[: at.start()] if at else message
    what = what[:1].lower() + what[1:]
    remedy = None
    if path.endswith(".role"):
        remedy = "Use 'system', 'developer', 'user', 'assistant' or 'tool'."
    elif path.endswith("response_format.type"):
        remedy = "Use 'text', 'json_object' or 'json_schema'."
    elif re.search(r"content\[\d+\]\.type$", path):
        remedy = "Only parts of type 'text' are supported."
    return RequestError(
        f"Invalid value for {path or 'the request'!r}: {what}.", remedy=remedy, param=param, code="invalid_value"
    )
