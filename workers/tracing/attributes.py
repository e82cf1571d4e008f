"""What spans say about themselves, and how what clients wrote becomes part of it. Knows no OpenTelemetry."""

from collections.abc import Mapping, Sequence

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]


def text(value: str, *, max_chars: int = 1024) -> str:
    """What a client wrote, as an attribute. One that protobuf cannot encode would be lost."""
    return value[:max_chars].encode(errors="backslashreplace").decode()


def number(value: int) -> int | str:
    """A client's whole number, as an attribute: as text where it does not fit into 64 bits with a sign."""
    return value if -(2**63) <= value < 2**63 else str(value)
