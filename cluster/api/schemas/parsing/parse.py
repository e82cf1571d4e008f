"""Parses a body's bytes into its struct, and explains what is wrong with them, naming the field to change.

Fields that cannot act are found by lenient.py; structure.py bounds its depth and its values. Knows no endpoint.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from cluster.api.schemas.parsing.lenient import find_ignored
from cluster.api.schemas.parsing.structure import check_structure
from workers.errors import RequestError

RequestT = TypeVar("RequestT", bound=msgspec.Struct)
_MISSING_FIELD = re.compile(r"missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
# Opens the docstring of a part that is parsed only so that its refusal can say what it is.
_REFUSED = "Refused by name"
_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")


def parse(
    body: bytes,
    kind: type[RequestT],
    *,
    model: str | None = None,
    strict: bool = False,
    adapt: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[RequestT, list[str]]:
    """The validated request, and the paths of its fields that are ignored. Raises RequestError naming the field.

    model: takes the place of the body's. strict: a field that would be ignored is refused. adapt: changes the decoded body first.
    """
    check_structure(body)
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RequestError(f"The request body is not valid JSON: {e}.", code="invalid_json") from e
    if not isinstance(fields, dict):
        raise RequestError("The request body must be a JSON object.", code="invalid_json")
    if model is not None:
        fields["model"] = model
    if adapt is not None:
        adapt(fields)
    ignored = find_ignored(fields, kind, strict=strict)
    try:
        return msgspec.convert(fields, kind, str_keys=True), ignored
    except (msgspec.ValidationError, OverflowError) as e:
        raise _explain(str(e), kind) from e


def _explain(message: str, kind: type[msgspec.Struct]) -> RequestError:
    at = _AT.search(message)
    path = at[1].replace("[...]", "") if at else ""
    param = re.split(r"[.\[]", path)[0] or None
    if missing := _MISSING_FIELD.search(message):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"You must provide {name!r}.", param=param or missing[1], code="missing_required_parameter")
    what = message[: at.start()] if at else message
    what = what[:1].lower() + what[1:]
    remedy = None
    if re.search(r"^tools\[\d*\]\.type$", path):
        remedy = "Only functions are supported: the server has no tools of its own."
    elif what.startswith("invalid ") and (values := _choices(kind, path)):
        is_part = re.search(r"content\[\d*\]\.type$", path)
        remedy = (
            f"Only parts of text are supported: {_listed(values, 'and')}."
            if is_part
            else f"Use {_listed(values, 'or')}."
        )
    return RequestError(
        f"Invalid value for {path or 'the request'!r}: {what}.", remedy=remedy, param=param, code="invalid_value"
    )


def _listed(values: list[str], last: str) -> str:
    quoted = [repr(value) for value in values]
    return f" {last} ".join(filter(None, (", ".join(quoted[:-1]), *quoted[-1:])))


def _choices(kind: type[msgspec.Struct], path: str) -> list[str]:
    """path: of the field that has a wrong value, with or without positions: `truncation`, `messages[0].content[1].type`.

    Of a struct's tag, those that are supported. Empty for a type that lists no values.
    """
    *parents, name = (step.partition("[")[0] for step in path.split("."))
    types = [_described(kind)]
    for step in parents:
        types = [field.type for found in _structs(types) for field in found.fields if field.encode_name == step]
    values = []
    for found in _structs(types):
        if found.tag_field == name and not (found.cls.__doc__ or "").startswith(_REFUSED):
            values.append(found.tag)
        for field in found.fields:
            if field.encode_name == name:
                values += [v for t in _flat(field.type) if isinstance(t, inspect.LiteralType) for v in t.values]
    return list(dict.fromkeys(value for value in values if isinstance(value, str)))


@functools.cache
def _described(kind: type[msgspec.Struct]) -> inspect.Type:
    return inspect.type_info(kind)


def _structs(types: list[inspect.Type]) -> list[inspect.StructType]:
    return [found for one in types for found in _flat(one) if isinstance(found, inspect.StructType)]


def _flat(one: inspect.Type) -> Iterator[inspect.Type]:
    """The members of unions and the items of lists."""
    match one:
        case inspect.UnionType():
            for member in one.types:
                yield from _flat(member)
        case inspect.ListType():
            yield from _flat(one.item_type)
        case inspect.Metadata():
            yield from _flat(one.type)
        case _:
            yield one
