"""Every exception Tramontane raises on purpose. Knows no caller: the HTTP surface maps these to statuses, commands to exit codes.

TramontaneError
├── ConfigError             a setting, or a checkpoint's configuration, that cannot work
├── CheckpointError         a weight file or tensor that is missing, extra, misshapen or truncated
├── RequestError            a request that can never be served as it stands
├── GroupError              a collective failed or timed out; `ranks` names those that did not arrive
├── EngineError             the engine stopped; every request it held ends with this
│   └── CrashedError        replicas crashed while they worked on this request; `num_crashes` of them
├── ReplicaUnavailableError no replica can take or finish the request now; a retry may succeed
├── OverloadedError         the server holds as many requests as it may; `retry_after_s` says when to come back
└── DeadlineExceededError   the time the client gave its request is over
"""

from typing import Any


class TramontaneError(Exception):
    """Base of all the exceptions above, with the parts of what a person reads.

    message: a sentence that says what is wrong. remedy: a sentence that says what to do, or None. param: the field or option to
    change, or None. `str()` is the message followed by the remedy.
    """

    def __init__(self, message: str, *, remedy: str | None = None, param: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message} {remedy}")
        self.message = message
        self.remedy = remedy
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        # By attributes: the default would call the class with `args`, and most classes here need keyword arguments.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[TramontaneError], args: tuple[object, ...], state: dict[str, Any]) -> TramontaneError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class ConfigError(TramontaneError):
    """A setting, or a checkpoint's configuration, that cannot work."""


class CheckpointError(TramontaneError):
    """A weight file or tensor that is missing, extra, misshapen or truncated."""


class RequestError(TramontaneError):
    """A request that can never be served as it stands. `param` is the field to change, `code` OpenAI's error code."""

    def __init__(
        self, message: str, *, remedy: str | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, remedy=remedy, param=param)
        self.code = code


class GroupError(TramontaneError):
    """A collective failed or timed out. `ranks` are those that did not arrive, as far as is known."""

    def __init__(self, message: str, *, remedy: str | None = None, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.ranks = ranks


class EngineError(TramontaneError):
    """The engine stopped; every request it held ends with this."""


class CrashedError(EngineError):
    """Replicas crashed while they worked on this request, `num_crashes` of them: it may be why, and is not tried again here.

    `alone`: the last one worked on nothing else.
    """

    def __init__(self, message: str, *, remedy: str | None = None, num_crashes: int, alone: bool) -> None:
        super().__init__(message, remedy=remedy)
        self.num_crashes = num_crashes
        self.alone = alone


class ReplicaUnavailableError(TramontaneError):
    """No replica can take or finish the request now; a retry may succeed.

    `crashed`: the replica ended by itself in mid-work, so that a request it worked on may be what ended it. False for one that froze,
    was cut off or was stopped. `alone`: the request is known to be the only one that it worked on.
    """

    def __init__(self, message: str, *, remedy: str | None = None, crashed: bool = False, alone: bool = False) -> None:
        super().__init__(message, remedy=remedy)
        self.crashed = crashed
        self.alone = alone


class OverloadedError(TramontaneError):
    """The server holds as many requests as it may. `retry_after_s`: a guess at when there is room again."""

    def __init__(self, message: str, *, remedy: str | None = None, retry_after_s: int) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(TramontaneError):
    """The time the client gave its request is over; what was generated of it stands."""
