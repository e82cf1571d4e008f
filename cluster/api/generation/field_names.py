"""Lets the errors of chat name the fields of another body that was turned into chat's. Knows errors only."""

import contextlib
import re
from collections.abc import Iterator, Mapping

from workers.errors import RequestError


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """names: chat's -> the other body's. In a message, a name is in quotes or at the beginning."""
    try:
        yield
    except RequestError as e:
        name = names.get(e.param or "")
        if name is None:
            raise
        message = re.sub(rf"^{e.param}(?=[:.\[])|(?<='){e.param}(?=')", name, e.message)
        raise type(e)(message, remedy=e.remedy, param=name, code=e.code) from e
