"""`tramontane keys create`, `list`, `revoke` and `usage`: what they print.

Knows the file of keys and the ledger next to it. Needs no server: a running one reloads the file by itself.
"""

import json
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.keys.file import add_key, default_path, read_keys, revoke_key
from cluster.keys.key import ApiKey, Limits, new_key
from cluster.keys.ledger import Group, Sums, ledger_path, read_usage, totals
from cluster.terminal.tables import answer_console, plain_table
from workers.errors import ConfigError

_NONE = "–"


def create(args: Namespace) -> None:
    try:
        limits = Limits(
            requests_per_minute=args.requests_per_minute,
            tokens_per_minute=args.tokens_per_minute,
            max_concurrency=args.max_concurrency,
            models=tuple(args.model) if args.model else None,
            priority=args.priority,
        )
    except ValueError as e:
        raise ConfigError(f"{e}.") from e
    key, secret = new_key(args.name, admin=args.admin, limits=limits)
    path = _path(args)
    add_key(path, key)
    # The secret alone on stdout, for `KEY=$(tramontane keys create NAME)`.
    print(f"Key {key.name} ({key.id}) is in {path}. This is its secret; it is not shown again:", file=sys.stderr)
    print(secret)


def list_keys(args: Namespace) -> None:
    path = _path(args)
    keys, used = read_keys(path), totals(read_usage(ledger_path(path)))
    if args.json:
        print(json.dumps([_as_json(key, used.get(key.id, Sums())) for key in keys], indent=2))
        return
    table = _table("Id", "Name", "Created", "Limits", right=("Requests", "Prompt", "Cached", "Generated", "Errors"))
    for key in keys:
        created = datetime.fromtimestamp(key.created, UTC).date().isoformat()
        table.add_row(key.id, key.name, created, _limits(key), *map("{:,}".format, used.get(key.id, Sums()).values()))
    _print(table)


def revoke(args: Namespace) -> None:
    key = revoke_key(_path(args), args.key)
    print(f"Key {key.name} ({key.id}) is revoked; running servers refuse it within a second or two.")


def show_usage(args: Namespace) -> None:
    if args.days < 1:
        raise ConfigError(f"--days {args.days} is not a number of days.", remedy="Use at least 1.", param="--days")
    usage = read_usage(ledger_path(_path(args)), days=args.days)
    if args.json:
        print(json.dumps([_line(group, sums) for group, sums in usage], indent=2))
        return
    table = _table("Day", "Name", "Model", "Endpoint", right=("Requests", "Prompt", "Cached", "Generated", "Errors"))
    for group, sums in usage:
        table.add_row(
            group.day, group.key_name, group.model or _NONE, group.endpoint, *map("{:,}".format, sums.values())
        )
    _print(table)


def _path(args: Namespace) -> Path:
    return args.file or default_path()


def _as_json(key: ApiKey, sums: Sums) -> dict[str, Any]:
    limits = {name: getattr(key.limits, name) for name in Limits.__struct_fields__}
    return {
        "id": key.id,
        "name": key.name,
        "created": key.created,
        "admin": key.admin,
        "limits": limits,
        "usage": vars(sums),
    }


def _line(group: Group, sums: Sums) -> dict[str, Any]:
    return {**vars(group), **vars(sums)}


def _limits(key: ApiKey) -> str:
    limits = key.limits
    words = [
        "admin" if key.admin else "",
        f"{limits.requests_per_minute:,} requests/min" if limits.requests_per_minute else "",
        f"{limits.tokens_per_minute:,} tokens/min" if limits.tokens_per_minute else "",
        f"{limits.max_concurrency:,} at once" if limits.max_concurrency else "",
        f"models {', '.join(limits.models)}" if limits.models is not None else "",
        f"priority {limits.priority}" if limits.priority is not None else "",
    ]
    return ", ".join(filter(None, words)) or "none"


def _table(*left: str, right: tuple[str, ...]) -> Table:
    table = plain_table()
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    answer_console().print(table)
