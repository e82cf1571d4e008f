"""Asks again while a server is busy or gone, with pauses that grow, until `patience_s` have passed. Knows no question."""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from workers.errors import ReplicaUnavailableError

T = TypeVar("T")
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 10.0


class Patience:
    """stop: ends the waiting."""

    def __init__(self, patience_s: float, stop: threading.Event) -> None:
        self._patience_s, self._stop = patience_s, stop

    def ask(self, question: Callable[[], T]) -> T:
        """Raises what `question` raises, and ReplicaUnavailableError when patience ends."""
        deadline, pause = time.monotonic() + self._patience_s, FIRST_PAUSE_S
        while True:
            try:
                return question()
            except ReplicaUnavailableError:
                # Not all at once, where many failed together.
                wait = pause * random.uniform(0.5, 1.0)
                if time.monotonic() + wait > deadline or self._stop.wait(wait):
                    raise
                pause = min(2 * pause, MAX_PAUSE_S)
