"""What a load needs of an HTTP client: send a body, and get each piece of the answer with the time it came. The command supplies it."""

from collections.abc import Mapping
from typing import Protocol


class Broken(Exception):
    """A request without a whole answer. kind: a few words for the report, such as "cannot connect"; message: what the system said."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class Answer(Protocol):
    """An answer whose body is still to be read. `headers` have lower-case names."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    async def chunk(self) -> tuple[float, bytes] | None:
        """The next piece of the body and the clock's time when it was received; None at the end. Raises Broken."""
        ...

    def close(self) -> None:
        """Idempotent. Drops the connection if the answer was not read to its end."""
        ...


class Transport(Protocol):
    """One server."""

    async def post(self, path: str, body: bytes) -> Answer:
        """path: from /, such as /v1/completions. body: JSON. Raises Broken."""
        ...
