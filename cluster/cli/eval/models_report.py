"""`tramontane eval --report`: the table of models from saved results. Knows the options and where results go; asks no server."""

import json
from argparse import Namespace
from pathlib import Path
from typing import TypeVar

import msgspec

from cluster.cli.options.rows.eval import EVAL, TABLE_OPTIONS
from cluster.eval.models_table import SavedBench, SavedReport, as_json, markdown, page, put_together
from cluster.eval.report import Prices
from cluster.terminal.phases import Console
from cluster.terminal.tables import answer_console
from workers.errors import ConfigError

T = TypeVar("T", SavedReport, SavedBench)


def print_models_table(args: Namespace) -> None:
    """Prints Markdown; with --output also writes table.md, table.json and table.html. Raises ConfigError."""
    for row in EVAL.options:
        if row.dest not in TABLE_OPTIONS and row.env is None and getattr(args, row.dest) != row.default:
            raise ConfigError(
                f"{row.names[0]} has no effect with --report, which asks no server.",
                remedy="Leave it out.",
                param=row.names[0],
            )
    reports = [_read(text, SavedReport, option="--report", file="report.json") for text in args.report]
    benches = [_read(text, SavedBench, option="--bench") for text in args.bench or ()]
    prices = Prices(prompt=args.price_prompt, output=args.price_output)
    table = put_together(reports, benches, prices=prices, price_per_hour=args.price_per_hour)
    text = markdown(table)
    answer_console().print(text, soft_wrap=True, end="")
    if args.output is not None:
        data = json.dumps(as_json(table), indent=1, ensure_ascii=False) + "\n"
        _write(args.output, {"table.md": text, "table.json": data, "table.html": page(table)})


def _read(text: str, kind: type[T], *, option: str, file: str | None = None) -> tuple[str | None, T]:
    """[NAME=]PATH -> the name, and what is saved there; a path that exists may have a = in it. file: the one in a folder."""
    name: str | None
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        name, rest = None, text
    path = Path(rest)
    if file is not None and path.is_dir():
        path /= file
    try:
        return name, msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as e:
        raise ConfigError(
            f"{option} {path} cannot be read: {e.strerror or e}.", remedy="Check the path.", param=option
        ) from e
    except msgspec.DecodeError as e:
        command = "the folder of `tramontane eval`" if kind is SavedReport else "the file of `tramontane bench --json`"
        raise ConfigError(f"{option} {path} has other contents: {e}.", remedy=f"Give {command}.", param=option) from e


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            Console().line(f"Wrote {folder / name}.")
    except OSError as e:
        raise ConfigError(
            f"{folder} cannot be written: {e.strerror or e}.",
            remedy="Give another folder with --output.",
            param="--output",
        ) from e
