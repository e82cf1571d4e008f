"""Lets the errors of chat name the fields of another body that was turned into chat's. Knows errors only."""

import contextlib
import re
from collections.abc import Iterator, Mapping

from workers.errors import RequestError

_POSITION = re.compile(r"^messages\[\d+\]: (.)")
_QUOTED = re.compile(r"(?<=')\w+(?=')")


@contextlib.contextmanager
def renamed(names: Mapping[str, str], *, result: str) -> Iterator[None]:
    """names: chat's -> the other body's. In a message, a name is in quotes or at the beginning. result: what holds a tool's result there.

    The position of a message is left out: it counts chat's messages, which are others than the body's.
    """
    try:
        yield
    except RequestError as e:
        name = names.get(e.param or "", e.param)
        message = _POSITION.sub(lambda found: found[1].upper(), e.message)
        if name != e.param:
            message = re.sub(rf"^{e.param}(?=[:.\[])|(?<='){e.param}(?=')", str(name), message)
        remedy = e.remedy
        if remedy is not None:
            remedy = remedy.replace("message of role 'tool'", result)
            remedy = _QUOTED.sub(lambda found: names.get(found[0], found[0]), remedy)
        if (message, remedy, name) == (e.message, e.remedy, e.param):
            raise
        raise type(e)(message, remedy=remedy, param=name, code=e.code) from e
