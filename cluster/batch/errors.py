"""Errors that concern a batch as a whole. A line that goes wrong is not an exception but a LineResult.

BatchError
├── StoreError      the database or the folder of files cannot be read or written; nothing is lost, a later run continues
└── LeaseLostError  another runner has taken over the batch; this one must stop
"""

from workers.errors import TramontaneError

NOTHING_LOST = "Nothing that was stored is lost."


class BatchError(TramontaneError):
    """Base of the two above. Its message is meant for the user."""


class StoreError(BatchError):
    """The database or the folder of files cannot be read or written, or belongs to a newer release."""


class LeaseLostError(BatchError):
    """Another runner has the batch. This runner must not store anything more."""
