"""`tramontane keys create`, `list`, `revoke` and `usage`: its options and what it prints.

Knows the keys' file and the ledger beside it; needs no server, since a running one reads the file again by itself.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.keys.file import API_KEYS_ENV, add_key, default_path, read_keys, revoke_key
from cluster.keys.key import ApiKey, Limits, new_key
from cluster.keys.ledger import Group, Sums, ledger_path, read_usage, totals
from cluster.system.log import LOG_LEVELS
from cluster.terminal.tables import answer_console, plain_table
from workers.errors import ConfigError

_NONE = "–"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `keys` and its own subcommands; each sets `run`."""
    about = "Creates, lists and revokes the keys that clients send. A server reads the file again when it changes."
    keys = commands.add_parser("keys", help="create, list and revoke API keys", description=about)
    kinds = keys.add_subparsers(required=True, metavar="COMMAND")

    create = _command(kinds, "create", _create, "make a key and show its secret, once")
    create.add_argument("name", metavar="NAME", help="who or what it is for")
    limits = create.add_argument_group("limits", "without these there are none; each gateway grants its share of them")
    limits.add_argument("--requests-per-minute", type=int, metavar="N")
    limits.add_argument("--tokens-per-minute", type=int, metavar="N", help="of prompts and answers together")
    limits.add_argument("--max-concurrency", type=int, metavar="N", help="requests running at once")
    limits.add_argument("--model", action="append", metavar="NAME", help="served name it may use; may be repeated")
    limits.add_argument(
        "--priority", type=int, metavar="N", help="best priority of its requests, and their default; smaller is sooner"
    )
    create.add_argument("--admin", action="store_true", help="may also use /admin, /debug and /metrics")

    listing = _command(kinds, "list", _list, "show the keys, their limits and what they used")
    listing.add_argument("--json", action="store_true", help="print JSON")

    revoke = _command(kinds, "revoke", _revoke, "make a key worthless")
    revoke.add_argument("key", metavar="ID-OR-NAME")

    usage = _command(kinds, "usage", _usage, "show what each key used, by day, model and endpoint")
    usage.add_argument(
        "--days", type=int, default=30, metavar="N", help="how many days, today (UTC) included (default: 30)"
    )
    usage.add_argument("--json", action="store_true", help="print JSON")


def _command(kinds: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=about, description=about.capitalize() + ".")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--file",
        type=Path,
        default=None,
        metavar="FILE",
        help=f"the keys' file (default: {API_KEYS_ENV}, or keys.json in ~/.config/tramontane)",
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="debug also shows tracebacks")
    return parser


def _create(args: argparse.Namespace) -> None:
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


def _list(args: argparse.Namespace) -> None:
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


def _revoke(args: argparse.Namespace) -> None:
    key = revoke_key(_path(args), args.key)
    print(f"Key {key.name} ({key.id}) is revoked; running servers refuse it within a second or two.")


def _usage(args: argparse.Namespace) -> None:
    if args.days < 1:
        raise ConfigError(f"--days {args.days} is no number of days; use at least 1.")
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


def _path(args: argparse.Namespace) -> Path:
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
