"""Parses a body's bytes into its struct, and explains what is wrong with them, naming the field to change.

Fields that cannot act are found by lenient.py; structure.py bounds its depth and its values. Knows no endpoint.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from cluster.api.schemas.parsing.choices import choices
from cluster.api.schemas.parsing.lenient import find_ignored
from cluster.api.schemas.parsing.structure import check_structure
from workers.errors import RequestError

RequestT = TypeVar("RequestT", bound=msgspec.Struct)
_MISSING_FIELD = re.compile(r"missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
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
    elif what.startswith("invalid ") and (values := choices(kind, path)):
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
