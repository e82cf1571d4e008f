"""Compiles a Jinja chat template into a function, in jinja2's sandbox, with the filters and blocks that transformers adds to Jinja.

A template is a program from the checkpoint that may fail in any way. Knows no messages and no tokens.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from workers.errors import ConfigError, RequestError

_ANY_MARK = re.compile("[\ufdd0-\ufdef]")
# After an escaped backslash it is the client's text.
_ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fd[de][0-9a-f])")
MAX_REASON_CHARS = 300


def compile_template(source: str) -> Callable[..., str]:
    """A function that renders the template from its variables and raises RequestError. Raises ConfigError for invalid Jinja."""
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ConfigError(f"The chat template is not valid Jinja: line {e.lineno}: {e.message}.") from e
    except (RecursionError, SyntaxError, MemoryError, ValueError) as e:  # of the Python code that Jinja makes of it
        raise ConfigError(f"The chat template cannot be compiled ({type(e).__name__}).") from e

    def render(**variables: Any) -> str:
        try:
            return template.render(**variables)
        except RaisedByTemplateError as e:
            raise RequestError(
                f"The conversation does not fit the chat template: {reason_of(e)}.", param="messages"
            ) from e
        except Exception as e:  # only this request fails
            raise RequestError(
                f"The chat template cannot render this conversation ({type(e).__name__}).", param="messages"
            ) from e

    return render


def reason_of(error: BaseException | None) -> str:
    """The first line of the message of an error inside a template, without marks."""
    return _ANY_MARK.sub("", str(error)).split("\n", 1)[0][:MAX_REASON_CHARS].rstrip(".")


def undeclared_variables(source: str) -> set[str]:
    """The variables that the template expects from the caller."""
    return set(jinja2.meta.find_undeclared_variables(_environment().parse(source)))


def names_in(source: str) -> set[str]:
    """Every variable and field that the template names."""
    tree = _environment().parse(source)
    keys = {key.value for item in tree.find_all(jinja2.nodes.Getitem) for key in item.find_all(jinja2.nodes.Const)}
    fields = {item.attr for item in tree.find_all(jinja2.nodes.Getattr)}
    return {*jinja2.meta.find_undeclared_variables(tree), *fields, *(key for key in keys if isinstance(key, str))}


class RaisedByTemplateError(jinja2.TemplateError):
    """Raised by the template itself, with its reason to reject a conversation."""


class _Generation(jinja2.ext.Extension):
    """The {% generation %} block of templates made for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 requires this form

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: without the HTML escapes of jinja2. Marks are not escaped."""
    written = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPED_MARK.sub(lambda m: m[1] + chr(int(m[2], 16)), written) if ensure_ascii else written


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise RaisedByTemplateError(message)

    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
