"""Suites: named lists of questions, each with a check of its answer. Knows the files, in YAML or JSON Lines, and the built-in suites.

    name: reasoning
    items:
      - id: add
        prompt: What is 17 + 25? Answer with the number only.
        check: {numeric: 42}

A line of a JSONL file is one such item; its suite has the file's name. See checks.py for what a check can be.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.eval.checks import Check, parse_check
from workers.errors import ConfigError

BUILT_IN = Path(__file__).parent / "suites"
DEFAULT_MAX_TOKENS = 128
_FIELDS = {"id", "prompt", "messages", "max_tokens", "check"}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. messages: of a conversation, as clients send them."""

    suite: str
    id: str
    messages: tuple[dict[str, Any], ...]
    check: Check
    max_tokens: int = DEFAULT_MAX_TOKENS

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.id}"


def built_in_names() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_suite(name: str) -> list[Item]:
    """name: of a built-in suite, or the path of a file. Raises ConfigError, which names the item that is wrong."""
    path = BUILT_IN / f"{name}.yaml" if name in built_in_names() else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"There is no suite {name!r}, neither built in nor a file.",
            remedy=f"Use one of {', '.join(built_in_names())}, or the path of a YAML or JSONL file.",
            param="SUITE",
        )
    try:
        text = path.read_text(encoding="utf-8")
        suite, entries = _entries(path, text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as e:
        raise ConfigError(f"The suite {path} cannot be read: {e}.", remedy="Correct the file.", param="SUITE") from e
    items = [_item(entry, suite=suite, place=f"{path}, item {number}") for number, entry in enumerate(entries, 1)]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ConfigError(
                f"{path} has two items with the id {item.id!r}.", remedy="Give each its own.", param="SUITE"
            )
        seen.add(item.id)
    if not items:
        raise ConfigError(f"{path} has no items.", remedy="Add some under `items`.", param="SUITE")
    return items


def _entries(path: Path, text: str) -> tuple[str, list[Any]]:
    if path.suffix == ".jsonl":
        return path.stem, [json.loads(line) for line in text.splitlines() if line.strip()]
    document = yaml.safe_load(text)
    if not isinstance(document, dict) or not isinstance(document.get("items"), list):
        raise ConfigError(f"{path} is not a suite: it has no list `items`.", remedy="Correct the file.", param="SUITE")
    return str(document.get("name", path.stem)), list(_with_system(document))


def _with_system(document: dict[str, Any]) -> Iterator[Any]:
    """The items, with the suite's `system` message before those that are a `prompt`."""
    system = document.get("system")
    for entry in document["items"]:
        if system is not None and isinstance(entry, dict) and "prompt" in entry:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": entry["prompt"]}]
            yield {**{key: value for key, value in entry.items() if key != "prompt"}, "messages": messages}
        else:
            yield entry


def _item(entry: Any, *, suite: str, place: str) -> Item:
    def wrong(reason: str) -> ConfigError:
        return ConfigError(f"{place}: {reason}.", remedy="Correct the item.", param="SUITE")

    if not isinstance(entry, dict):
        raise wrong("it is not an object")
    if unknown := sorted(set(entry) - _FIELDS):
        raise wrong(f"it has an unknown field {unknown[0]!r}; items have {', '.join(sorted(_FIELDS))}")
    messages = entry.get("messages", [{"role": "user", "content": entry.get("prompt")}])
    is_valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not is_valid or not messages or ("prompt" in entry) == ("messages" in entry):
        raise wrong("it needs either a text `prompt` or a list `messages` with role and content")
    max_tokens = entry.get("max_tokens", DEFAULT_MAX_TOKENS)
    if type(max_tokens) is not int or max_tokens < 1:
        raise wrong(f"max_tokens is {max_tokens!r}, not a positive number")
    try:
        check = parse_check(entry.get("check"))
    except ValueError as e:
        raise wrong(str(e)) from e
    return Item(
        suite=suite, id=str(entry.get("id", place)), messages=tuple(messages), check=check, max_tokens=max_tokens
    )
