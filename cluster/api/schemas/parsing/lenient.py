"""Finds the fields of a decoded body that cannot act: unknown ones, and those of foreign_fields.py.

Walks the body next to its struct's type, once, before the conversion, which drops what the walk has found. Looks into fields that may hold
structs only: a prompt of a million token ids costs nothing. The paths name no list positions, so a thousand messages with the same unknown
field give one path. Names come from the client: paths are short, printable ASCII without commas, and there are few of them, so that they
can be written to a header and a log. Knows no endpoint and no values of fields.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import msgspec

from cluster.api.schemas.parsing.foreign_fields import FOREIGN, Foreign, is_one_of
from workers.errors import RequestError

MAX_PATHS = 32
MAX_NAME_CHARS = 64
MORE = "..."  # stands for the paths beyond MAX_PATHS, and for the rest of a long name
# What --strict accepts in a known field that has no effect.
NOTHING: tuple[Any, ...] = (None, False, [], {})
_UNSAFE = re.compile(r"[^A-Za-z0-9_.$@:/-]")


@dataclass(frozen=True, slots=True)
class _Shape:
    """A struct's fields; `inner`: those that may hold structs."""

    known: frozenset[str]
    foreign: Mapping[str, Foreign]
    inner: Mapping[str, "_Node"]


@dataclass(frozen=True, slots=True)
class _Node:
    """Where a value may be a struct or a list of them. `shapes` by the struct's tag; None is the tag of an untagged struct."""

    shapes: Mapping[str | None, _Shape]
    tag_field: str | None
    item: "_Node | None"


@dataclass(slots=True)
class _Walk:
    """strict: the first field that cannot act is refused. `paths` is a set that keeps its order."""

    strict: bool
    paths: dict[str, None] = field(default_factory=dict)

    def visit(self, value: Any, node: _Node, path: str) -> None:
        if isinstance(value, list):
            if node.item is not None:
                for item in value:
                    self.visit(item, node.item, f"{path}[]")
        elif isinstance(value, dict) and node.shapes:
            tag = None if node.tag_field is None else value.get(node.tag_field)
            shape = node.shapes.get(tag) if tag is None or isinstance(tag, str) else None
            if shape is not None:
                self.visit_struct(value, shape, path)

    def visit_struct(self, fields: dict[str, Any], shape: _Shape, path: str) -> None:
        for name, foreign in shape.foreign.items():
            if name in fields and foreign.refuses(fields[name]):
                raise _unsupported(path_of(path, name), foreign)
        for name in fields:
            if name not in shape.known and not self._report(name, fields[name], shape.foreign.get(name), path):
                break
        for name, node in shape.inner.items():
            if name in fields:
                self.visit(fields[name], node, path_of(path, name))

    def _report(self, name: str, value: Any, foreign: Foreign | None, path: str) -> bool:
        """Returns whether there is room for more."""
        where = path_of(path, name)
        if self.strict and foreign is None:
            raise _unknown(where)
        if self.strict and foreign is not None and not is_one_of(value, foreign.neutral or NOTHING):
            raise _without_effect(where)
        if where not in self.paths:
            if len(self.paths) >= MAX_PATHS:
                self.paths[MORE] = None
                return False
            self.paths[where] = None
        return True


def find_ignored(fields: dict[str, Any], kind: type[msgspec.Struct], *, strict: bool) -> list[str]:
    """The paths of fields that will be ignored. Raises RequestError for what is refused; strict: for all of them."""
    walk = _Walk(strict)
    walk.visit_struct(fields, _shape_of(kind), "")
    return list(walk.paths)


def path_of(path: str, name: str) -> str:
    """The path of a field inside another one ("": of the body). The name is the client's, and may be anything."""
    safe = _UNSAFE.sub("?", name[:MAX_NAME_CHARS]) + (MORE if len(name) > MAX_NAME_CHARS else "")
    safe = safe or '""'
    return f"{path}.{safe}" if path else safe


def _param(path: str) -> str:
    return re.split(r"[.\[]", path)[0] or path


def _unsupported(path: str, foreign: Foreign) -> RequestError:
    return RequestError(
        f"{path!r} is not supported by this server.",
        remedy=foreign.meaning if foreign.meaning.startswith(("Send", "Put")) else f"{foreign.meaning} Remove it.",
        param=_param(path),
        code="unsupported_parameter",
    )


def _unknown(path: str) -> RequestError:
    return RequestError(
        f"Unrecognized request argument supplied: {path}.",
        remedy="Remove it, or correct its name.",
        param=_param(path),
        code="unknown_parameter",
    )


def _without_effect(path: str) -> RequestError:
    return RequestError(
        f"{path!r} has no effect on this server, which refuses such fields (--strict).",
        remedy="Remove it.",
        param=_param(path),
        code="unsupported_parameter",
    )


@cache
def _shape_of(kind: type[msgspec.Struct]) -> _Shape:
    info = cast(msgspec.inspect.StructType, msgspec.inspect.type_info(kind))
    names = {f.encode_name for f in info.fields} | ({info.tag_field} if info.tag_field else set())
    nodes = {f.encode_name: _node_of(f.type) for f in info.fields}
    return _Shape(
        frozenset(names), FOREIGN.get(kind, {}), {name: node for name, node in nodes.items() if node is not None}
    )


def _node_of(info: msgspec.inspect.Type) -> _Node | None:
    """None for a type without structs."""
    shapes: dict[str | None, _Shape] = {}
    tag_field, item = None, None
    for part in info.types if isinstance(info, msgspec.inspect.UnionType) else (info,):
        if isinstance(part, msgspec.inspect.Metadata):
            part = part.type
        if isinstance(part, msgspec.inspect.StructType):
            tag_field = part.tag_field
            shapes[cast("str | None", part.tag)] = _shape_of(part.cls)
        elif isinstance(part, msgspec.inspect.ListType):
            item = _node_of(part.item_type)
    return _Node(shapes, tag_field, item) if shapes or item is not None else None
