"""How findings write amounts: bytes in binary units, and counts with their noun."""

GIB, MIB = 2**30, 2**20


def format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:,.1f} MiB"


def counted(number: int, noun: str) -> str:
    """ "no problems", "1 problem", "2 problems"."""
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"
