"""The way of most events of a stream: from who makes them to the client's socket, without a switch to the task that reads the stream.

A task that waits for one token is a dozen of nested coroutines, each of which Python enters and leaves for each token. Knows no event and
no socket.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shortcut(Generic[T]):
    """Call `write` only where `is_free`: all events before are written, and the client is not slow."""

    is_free: Callable[[], bool]
    write: Callable[[T], None]

    def __init__(self) -> None:
        self.close()

    def open(self, *, is_free: Callable[[], bool], write: Callable[[T], None]) -> None:
        """For who reads the stream."""
        self.is_free, self.write = is_free, write

    def close(self) -> None:
        """It is not free from now on."""
        self.is_free, self.write = _never, _refuse


def _never() -> bool:
    return False


def _refuse(event: object) -> None:
    raise AssertionError("the shortcut is not free")
