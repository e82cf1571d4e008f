"""The rows of `tramontane keys create`, `list`, `revoke` and `usage`."""

from pathlib import Path

from cluster.cli.options.option import Command, Group, argument, option, switch
from cluster.cli.options.rows.shared import JSON, LOG_LEVEL
from cluster.keys.file import API_KEYS_ENV

_COMMON = (
    option(
        "--file",
        parse=Path,
        metavar="FILE",
        env=API_KEYS_ENV,
        help="file of keys",
        shown_default="~/.config/tramontane/keys.json",
    ),
    LOG_LEVEL,
)

CREATE = Command(
    name="keys create",
    help="create a key and print its secret, once",
    description="Creates a key and prints its secret, once.",
    run="cluster.cli.keys:create",
    groups=(
        Group(None, (*_COMMON, argument("name", metavar="NAME", help="who or what the key is for"))),
        Group(
            "limits",
            (
                option("--requests-per-minute", parse=int, metavar="N", help="most requests in a minute"),
                option(
                    "--tokens-per-minute", parse=int, metavar="N", help="most tokens of prompts and answers in a minute"
                ),
                option("--max-concurrency", parse=int, metavar="N", help="most requests running at once"),
                option("--model", kind="list", metavar="NAME", help="served model it may use; may be repeated"),
                option(
                    "--priority",
                    parse=int,
                    metavar="N",
                    help="best priority its requests may have, and their default; a smaller number is served first",
                ),
            ),
            note="without these options a key has no limits; each gateway grants its share of a limit",
        ),
        Group(None, (switch("--admin", help="the key may also use /admin, /debug and /metrics"),)),
    ),
)

LIST = Command(
    name="keys list",
    help="show the keys, their limits and their usage",
    description="Shows the keys, their limits and their usage.",
    run="cluster.cli.keys:list_keys",
    groups=(Group(None, (*_COMMON, JSON)),),
)

REVOKE = Command(
    name="keys revoke",
    help="revoke a key",
    description="Revokes a key; running servers refuse it within a second or two.",
    run="cluster.cli.keys:revoke",
    groups=(Group(None, (*_COMMON, argument("key", metavar="ID-OR-NAME", help="id or name of the key"))),),
)

USAGE = Command(
    name="keys usage",
    help="show what each key used, by day, model and endpoint",
    description="Shows what each key used, by day, model and endpoint.",
    run="cluster.cli.keys:show_usage",
    groups=(
        Group(
            None,
            (
                *_COMMON,
                option("--days", parse=int, metavar="N", default=30, help="number of days, including today (UTC)"),
                JSON,
            ),
        ),
    ),
)

KEYS_COMMANDS = (CREATE, LIST, REVOKE, USAGE)
