"""From the table to parsed arguments: argparse reads the command line, then environment variables fill what is missing."""

import argparse
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.cli.options.option import Command, Option
from cluster.cli.options.table import COMMANDS, DESCRIPTION, FAMILIES

_BUILTIN: tuple[Callable[[str], Any], ...] = (str, int, float, Path)


def parse(argv: Sequence[str] | None = None, *, environ: Mapping[str, str] = os.environ) -> Namespace:
    """The arguments of one command; `run` is its Command. Exits with 2 and a message for a command line that cannot be read."""
    parser = make_parser(environ=environ)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(args.run, unknown[0].partition("=")[0]))
    read_environment(args, args.run.options, environ=environ)
    if getattr(args, "config", None) is not None:
        args.given = _given(argv, args.run.options, environ=environ)
    return args


def _unknown(command: Command, word: str) -> str:
    """What is said of a word that the command does not take."""
    names = [name for option in command.options for name in option.names]
    near = get_close_matches(word, names, n=1) if word.startswith("-") else []
    meant = f"; did you mean {near[0]}?" if near else "."
    return (
        f"`tramontane {command.name}` does not take {word}{meant} `tramontane {command.name} --help` lists its options."
    )


def _given(argv: Sequence[str] | None, options: Iterable[Option], *, environ: Mapping[str, str]) -> frozenset[str]:
    """The attributes that the command line or the environment sets, where a file has the rest."""
    named = vars(make_parser(environ=environ, has_defaults=False).parse_args(argv))
    return frozenset(named) | {option.dest for option in options if option.env and environ.get(option.env)}


def make_parser(*, environ: Mapping[str, str] = os.environ, has_defaults: bool = True) -> argparse.ArgumentParser:
    """The parser of all commands. has_defaults: whether options that are not given have their default, or are missing."""
    required = (option.env for command in COMMANDS for option in command.options if option.is_required and option.env)
    return _make_parser(frozenset(name for name in required if environ.get(name)), has_defaults)


@cache  # it takes 10 ms, and a process may read several command lines
def _make_parser(variables: frozenset[str], has_defaults: bool) -> argparse.ArgumentParser:
    """variables: those that are set and stand for a required option."""
    parser = argparse.ArgumentParser(prog="tramontane", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"tramontane {version('tramontane')}")
    top = parser.add_subparsers(required=True, metavar="COMMAND")
    families: dict[str, Any] = {}
    for command in COMMANDS:
        family, _, name = command.name.rpartition(" ")
        if family and family not in families:
            about, description = FAMILIES[family]
            members = top.add_parser(family, help=about, description=description)
            families[family] = members.add_subparsers(required=True, metavar="COMMAND")
        where = families[family] if family else top
        _fill(
            where.add_parser(name, help=command.help, description=_escaped(command.description)),
            command,
            variables,
            has_defaults,
        )
    return parser


def read_environment(args: Namespace, options: Iterable[Option], *, environ: Mapping[str, str]) -> None:
    """Fills options that were not given from their environment variables; an empty variable counts as not set."""
    for option in options:
        if option.env is None or getattr(args, option.dest) is not None:
            continue
        ignored = option.ignore_env_with is not None and getattr(args, option.ignore_env_with)
        if (text := environ.get(option.env)) and not ignored:
            setattr(args, option.dest, option.parse(text))


def help_text(option: Option) -> str:
    """The help, then default and environment variable in brackets."""
    notes = [f"env: {option.env}"] if option.env else []
    if option.shown_default:
        notes.append(f"default: {option.shown_default}")
    return f"{option.help} ({'; '.join(notes)})" if notes else option.help


def _fill(parser: argparse.ArgumentParser, command: Command, variables: frozenset[str], has_defaults: bool) -> None:
    parser.set_defaults(run=command, **dict(command.constants))
    for group in command.groups:
        where: Any = parser
        if group.title is not None:
            where = parser.add_argument_group(group.title, group.note)
        for option in group.options:
            _add(where, option, variables, has_default=has_defaults and not option.is_remembered)


def _add(where: Any, option: Option, variables: frozenset[str], *, has_default: bool) -> None:
    given: dict[str, Any] = {"help": _escaped(help_text(option))}
    names = option.names
    default = option.default if has_default else argparse.SUPPRESS
    if option.kind == "switch":
        given |= {"action": "store_true", "default": default, "dest": option.dest}
    elif option.kind == "toggle":
        names = names[:1]  # argparse adds the other one
        given |= {"action": argparse.BooleanOptionalAction, "default": default, "dest": option.dest}
    elif option.kind == "list":
        given |= {"action": "append", "type": _argparse_type(option.parse), "metavar": option.metavar}
        given |= {"default": default, "dest": option.dest}
    else:
        given |= {"type": _argparse_type(option.parse), "metavar": option.metavar, "choices": option.choices or None}
        if option.kind == "value":
            is_required = option.is_required and option.env not in variables
            given |= {"default": default, "dest": option.dest, "required": is_required}
        elif option.kind == "optional argument":
            given |= {"nargs": "?", "default": default}
    where.add_argument(*names, **given)


def _argparse_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse shows the reason of an ArgumentTypeError only; for the built-in types its own words do."""
    if parse in _BUILTIN:
        return parse

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    return convert


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
