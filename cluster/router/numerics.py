"""Whether a stream that lost its replica waits for one that computes the same last bits. Pure: the clock is an argument.

Replicas with the same `EngineFacts.numerics` continue each other's streams byte for byte. On another replica a stream continues as well,
but a later token or log-probability may differ from those of one undisturbed run, and the response says so.
"""

from collections.abc import Container

# A crashed replica of a small model is back on its node in about ten seconds. Clients hear of a silent stream after fifteen, see sse.py.
MAX_WAIT_S = 15.0


def required_numerics(
    produced_by: str | None,
    present: Container[str | None],
    *,
    expected: bool,
    waited_s: float,
    max_wait_s: float = MAX_WAIT_S,
) -> str | None:
    """The numerics that the stream's next replica must have; None if any replica will do.

    produced_by: of the replica that produced the stream's newest token; None before the first token. present: of all replicas that may
    serve now or in a moment. expected: whether another replica may come.
    """
    if produced_by is None or waited_s >= max_wait_s:
        return None
    return produced_by if expected or produced_by in present else None
