"""The page docs/options.md, written from the table. `make docs` writes it; a test compares it with the table."""

import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.cli.options.option import Command, Group, Option
from cluster.cli.options.table import COMMANDS

HEAD = """\
# Options

Every option of every `tramontane` command. This page is generated from the option table in `cluster/cli/options/`: change an option
there, then run `make docs`.

An option wins over its environment variable. Commands exit with 0 when they are done or stopped, 1 when something failed, 2 when an option
cannot work.
"""


def page() -> str:
    """The whole page, in Markdown."""
    contents = "\n".join(
        f"- [`tramontane {c.name}`](#tramontane-{c.name.replace(' ', '-')}): {c.help}" for c in COMMANDS
    )
    return "\n".join([HEAD, contents, "", *(_command(c) for c in COMMANDS)])


def _command(command: Command) -> str:
    lines = [f"## tramontane {command.name}", "", command.description, ""]
    return "\n".join([*lines, *(line for group in command.groups for line in _group(group))])


def _group(group: Group) -> Iterator[str]:
    if group.title is not None:
        yield from (f"### {group.title}", "")
    if group.note is not None:
        yield from (f"{group.note[0].upper()}{group.note[1:]}.", "")
    yield from ("| Option | Default | Environment | What it does |", "|---|---|---|---|")
    yield from (_row(option) for option in group.options)
    yield ""


def _row(option: Option) -> str:
    if option.kind in ("argument", "optional argument"):
        name = f"`{option.value_name}`"
    else:
        name = ", ".join(f"`{flag} {option.value_name}`".replace(" `", "`") for flag in option.names)
    default = "as in `batch run`" if option.is_remembered else option.shown_default
    if option.is_required or option.kind == "argument":
        default = "(required)"
    cells = (name, default, f"`{option.env}`" if option.env else "", option.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
