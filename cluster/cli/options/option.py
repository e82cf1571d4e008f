"""One option as a row of the table: what the parser, the environment, the configuration and docs/options.md need to know about it.

A default stands in one place. A row that fills a field of a configuration takes the field's default; other rows name the constant that
owns the number, or own it themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

Kind = Literal["value", "switch", "toggle", "list", "argument", "optional argument"]
_UNSET: Any = object()


@dataclass(frozen=True)
class Fills:
    """Fields of a configuration class that one option fills; `convert` turns the option's value into theirs, a tuple for several."""

    config: type
    names: tuple[str, ...]
    convert: Callable[[Any], Any] = lambda value: value

    def default(self) -> Any:
        """The first field's default; None where it has none."""
        default = next(f.default for f in fields(self.config) if f.name == self.names[0])
        return None if default is MISSING else default

    def values(self, value: Any) -> dict[str, Any]:
        """Field name -> value."""
        converted = self.convert(value)
        return dict(zip(self.names, converted if len(self.names) > 1 else (converted,), strict=True))


@dataclass(frozen=True, kw_only=True)
class Option:
    """`names`: flags, or the one name of an argument without a flag. `dest`: the attribute of the parsed arguments.

    parse: turns text into the value; raises ValueError with the reason. default: the value without the option. shown_default: how help
    and page write it; "" shows none. env: the environment variable that gives the value where the option is missing.
    ignore_env_with: the switch (its dest) that leaves no use for `env`. is_remembered: `batch resume` takes a missing value from the job.
    """

    names: tuple[str, ...]
    help: str
    dest: str
    kind: Kind = "value"
    metavar: str | None = None
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    default: Any = None
    shown_default: str = ""
    env: str | None = None
    ignore_env_with: str | None = None
    is_required: bool = False
    is_remembered: bool = False
    fills: Fills | None = None

    @property
    def value_name(self) -> str:
        """What stands for the value in help and page: N, FILE, {a,b}; empty for a switch and a toggle."""
        if self.kind in ("switch", "toggle"):
            return ""
        if self.metavar is None and self.choices:
            return f"{{{','.join(self.choices)}}}"
        return self.metavar or self.dest.upper()


@dataclass(frozen=True)
class Group:
    """Options under one heading; None: under none."""

    title: str | None
    options: tuple[Option, ...]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Command:
    """`name`: the words after `tramontane`. `run`: `module:function`, imported when the command runs; it takes the parsed arguments.

    constants: attributes that every run of this command has, and no option sets.
    """

    name: str
    help: str
    description: str
    run: str
    groups: tuple[Group, ...]
    constants: tuple[tuple[str, Any], ...] = ()

    @property
    def options(self) -> Iterator[Option]:
        for group in self.groups:
            yield from group.options


def option(
    *names: str,
    help: str,  # noqa: A002  # argparse's word
    dest: str | None = None,
    default: Any = _UNSET,
    shown_default: str | None = None,
    fills: Fills | None = None,
    **more: Any,
) -> Option:
    """A row. Without `default`, that of the field it fills, or None; without `shown_default`, the default as Python writes it."""
    if default is _UNSET:
        default = None if fills is None else fills.default()
    if shown_default is None:
        shown_default = "" if default is None or default is False else _plain(default)
    long = next((name for name in names if name.startswith("--")), names[0])
    return Option(
        names=names,
        help=help,
        dest=dest or long.lstrip("-").replace("-", "_"),
        default=default,
        shown_default=shown_default,
        fills=fills,
        **more,
    )


def switch(name: str, *, help: str, fills: Fills | None = None, dest: str | None = None) -> Option:  # noqa: A002
    """A row without a value: false where it is not given."""
    return option(name, help=help, dest=dest, kind="switch", default=False, fills=fills)


def toggle(name: str, *, help: str, fills: Fills, shown_default: str) -> Option:  # noqa: A002
    """A row of two flags without a value, such as --x for true and --no-x for false: None where neither is given."""
    names = (name, f"--no-{name.removeprefix('--')}")
    return option(*names, help=help, kind="toggle", default=None, shown_default=shown_default, fills=fills)


def argument(name: str, *, metavar: str, help: str, is_optional: bool = False, shown_default: str = "") -> Option:  # noqa: A002
    """A row without a flag."""
    kind: Kind = "optional argument" if is_optional else "argument"
    return option(name, help=help, kind=kind, metavar=metavar, shown_default=shown_default)


def remembered(options: tuple[Option, ...]) -> tuple[Option, ...]:
    """The same rows for `batch resume`: what is not given stays as `batch run` was given it."""
    return tuple(replace(o, is_remembered=True, default=None, shown_default="") for o in options)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
