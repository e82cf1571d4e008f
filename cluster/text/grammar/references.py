"""Resolves the references of a JSON schema: `$ref` with pointers and URIs, `$id`, `$anchor`, and a `$dynamicRef` that has one target.

The result has references of one form, "#/$defs/r0", to definitions that nothing else contains. So a schema can be rewritten or moved
without breaking a reference, and a definition that nothing refers to is gone. Knows no other keywords.
"""

import json
import urllib.parse
from typing import Any

from cluster.text.grammar.errors import GrammarError
from cluster.text.grammar.walk import DATA_KEYS, MAP_KEYS, subschemas

_MAX_INLINED_CHARS = 200_000
_IDENTIFIERS = ("$id", "$anchor", "$dynamicAnchor")


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with "$defs" of the schemas that it refers to. Raises GrammarError for a reference that points to nothing inside it."""
    return _Document(schema).rewritten()


class _Document:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._base_of: dict[int, str] = {}  # by id() of the node: the URI that its references are relative to
        self._resources: dict[str, dict[str, Any]] = {}
        self._anchors: dict[str, dict[str, Any]] = {}  # by URI with fragment
        self._num_dynamic: dict[str, int] = {}
        self._names: dict[int, str] = {}  # of definitions, by id() of the node
        self._targets: list[Any] = []
        self._register(root, "")

    def rewritten(self) -> dict[str, Any]:
        self._find_targets()
        result: dict[str, Any] = self._rewrite(self._root)
        definitions = {}
        for i, target in enumerate(self._targets):
            definitions[f"r{i}"] = self._rewrite_node(target) if isinstance(target, dict) else target
        room = _MAX_INLINED_CHARS
        for definition in definitions.values():
            if not isinstance(definition, dict) or not isinstance(definition.get("oneOf"), list):
                continue
            options = [_inlined(option, definitions) for option in definition["oneOf"]]
            room -= len(json.dumps(options))
            if room > 0:
                definition["oneOf"] = options
        return result | {"$defs": definitions} if definitions else result

    def _register(self, node: dict[str, Any], base: str) -> None:
        identifier = node.get("$id")
        if isinstance(identifier, str) and not identifier.startswith("#"):
            base = urllib.parse.urljoin(base, identifier).partition("#")[0]
        if node is self._root or isinstance(identifier, str):
            self._resources.setdefault(base, node)
        self._base_of[id(node)] = base
        for key in _IDENTIFIERS:
            name = node.get(key)
            if key == "$id":
                # Until draft 7, an $id of only a fragment was an anchor.
                name = name[1:] if isinstance(name, str) and name.startswith("#") else None
            if not isinstance(name, str) or not name:
                continue
            if self._anchors.setdefault(f"{base}#{name}", node) is not node:
                raise GrammarError(f"{key} {name!r} is used twice.", remedy="Use each name once.")
            if key == "$dynamicAnchor":
                self._num_dynamic[name] = self._num_dynamic.get(name, 0) + 1
        for _, child in subschemas(node):
            self._register(child, base)

    def _find_targets(self) -> None:
        """Names the targets in the order in which they are needed. Definitions that nothing refers to are not visited."""
        nodes, seen = [self._root], set()
        while nodes:
            node = nodes.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            options = node.get("oneOf")
            if isinstance(options, list) and any(isinstance(option, dict) and "$ref" in option for option in options):
                self._name(node)  # see _inlined
            nodes += [child for path, child in subschemas(node) if path[0] not in ("$defs", "definitions")]
            target = self._target_of(node)
            if target is not None:
                self._name(target)
                if isinstance(target, dict):
                    nodes.append(target)

    def _name(self, target: Any) -> None:
        if id(target) not in self._names:
            self._names[id(target)] = f"r{len(self._targets)}"
            self._targets.append(target)

    def _target_of(self, node: dict[str, Any]) -> Any:
        reference = node.get("$ref")
        dynamic = node.get("$dynamicRef")
        if isinstance(dynamic, str):
            name = dynamic.partition("#")[2]
            if reference is not None or self._num_dynamic.get(name, 0) > 1:
                raise GrammarError(
                    f"the $dynamicRef {dynamic!r} has more than one possible target.", remedy="Use $ref instead."
                )
            reference = dynamic
        if not isinstance(reference, str):
            return None
        base = self._base_of.get(id(node), "")
        uri, _, fragment = urllib.parse.urljoin(base, reference).partition("#")
        if reference.startswith("#"):
            uri, fragment = base, reference[1:]
        resource = self._resources.get(uri)
        if resource is None:
            raise GrammarError("a $ref must point into the schema itself, like '#/$defs/name'.")
        fragment = urllib.parse.unquote(fragment)
        if fragment and not fragment.startswith("/"):
            if f"{uri}#{fragment}" not in self._anchors:
                raise GrammarError(
                    f"the $ref {reference!r} points to an $anchor that the schema does not have.",
                    remedy="Add it, or point to a place like '#/$defs/name'.",
                )
            return self._anchors[f"{uri}#{fragment}"]
        return _follow(resource, fragment)

    def _rewrite(self, value: Any) -> Any:
        """A schema, or a list of schemas."""
        if isinstance(value, list):
            return [self._rewrite(item) for item in value]
        if not isinstance(value, dict):
            return value
        name = self._names.get(id(value))
        return self._rewrite_node(value) if name is None else {"$ref": f"#/$defs/{name}"}

    def _rewrite_node(self, node: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.items():
            if key in ("$defs", "definitions", "$dynamicRef", *_IDENTIFIERS):
                continue
            if key in MAP_KEYS and isinstance(value, dict):
                result[key] = {name: self._rewrite(item) for name, item in value.items()}
            else:
                result[key] = value if key in DATA_KEYS else self._rewrite(value)
        target = self._target_of(node)
        if target is not None:
            result["$ref"] = f"#/$defs/{self._names[id(target)]}"
        return result


def _inlined(option: Any, definitions: dict[str, Any]) -> Any:
    """What an option of a oneOf refers to: llguidance does not follow references when it checks that no two options overlap.

    A oneOf of references is a definition itself, so what is inlined here contains none, and this ends.
    """
    if not isinstance(option, dict) or option.keys() - {"$ref", "title", "description"}:
        return option
    target = definitions.get(option.get("$ref", "").removeprefix("#/$defs/"))
    return option if target is None or (isinstance(target, dict) and "oneOf" in target) else target


def _follow(node: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise GrammarError("a $ref points to nothing in the schema.")
    if not isinstance(node, dict | bool):
        raise GrammarError("a $ref points to something that is not a schema.")
    return node
