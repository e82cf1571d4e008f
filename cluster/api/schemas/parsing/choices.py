"""The values that a field may have, where its type lists them, so that an error can name them.

Knows msgspec's descriptions of types and the paths in its errors. Knows no field by name.
"""

import functools
from collections.abc import Iterator

import msgspec
from msgspec import inspect

# Opens the docstring of a part that is parsed only so that its refusal can say what it is.
_REFUSED = "Refused by name"


def choices(kind: type[msgspec.Struct], path: str) -> list[str]:
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
