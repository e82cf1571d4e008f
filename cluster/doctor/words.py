"""How findings put things: amounts, counts, and our exceptions' sentences taken apart. Knows nothing of what is found."""

from workers.errors import TramontaneError

GIB, MIB = 2**30, 2**20


def size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:,.1f} MiB"


def counted(number: int, word: str) -> str:
    """ "no problems", "1 problem", "2 problems"."""
    return f"{number or 'no'} {word}{'s' * (number != 1)}"


def sentence_and_remedy(error: TramontaneError, *, otherwise: str) -> tuple[str, str]:
    """What is wrong and what to do: our messages have a semicolon between them; those that do not get the remedy `otherwise`."""
    sentence, _, remedy = str(error).rstrip(".").partition("; ")
    return f"{sentence}.", f"{remedy[0].upper()}{remedy[1:]}." if remedy else otherwise
