"""What can go wrong around a batch as a whole. What goes wrong with one line is a LineResult, no exception.

BatchError
├── StoreError      the database, or the folder of files, cannot be read or written: nothing was lost, a later run goes on
└── LeaseLostError  another runner has taken the batch over; this one must let go of it
"""

from workers.errors import TramontaneError


class BatchError(TramontaneError):
    """Base of the two above. The message is one sentence meant for the user."""


class StoreError(BatchError):
    """The database or the folder of files cannot be read or written, or belongs to a newer release."""


class LeaseLostError(BatchError):
    """The batch has another runner by now: nothing that this one still holds may be stored."""
