"""Every exception that Tramontane raises on purpose. Knows no caller: the HTTP server maps these to statuses, commands to exit codes.

TramontaneError
├── ConfigError             a setting, or a checkpoint's configuration, that cannot work
├── CheckpointError         a weight file or tensor that is missing, extra, truncated or of the wrong shape
├── RequestError            a request that can never be served without changes
│   └── AdapterNotLoadedError   it names an adapter that this replica does not have; another one may
├── GroupError              a collective failed or timed out; `ranks` are the missing ones
├── EngineError             the engine stopped; all its requests end with this
│   └── CrashedError        replicas crashed while they worked on this request; `num_crashes` of them
├── ReplicaUnavailableError no replica can accept or finish the request now; a retry may succeed
├── OverloadedError         the server has as many requests as it may; `retry_after_s` says when to retry
└── DeadlineExceededError   the request's deadline, set by the client, has passed
"""

from typing import Any


class TramontaneError(Exception):
    """Base of all the exceptions above, with the parts of the message that a person reads.

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
    """A weight file or tensor that is missing, extra, truncated or of the wrong shape."""


class RequestError(TramontaneError):
    """A request that can never be served without changes. `param` is the field to change, `code` OpenAI's error code."""

    def __init__(
        self, message: str, *, remedy: str | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, remedy=remedy, param=param)
        self.code = code


class AdapterNotLoadedError(RequestError):
    """A request names an adapter that this replica does not have. Another replica may have it."""


class GroupError(TramontaneError):
    """A collective failed or timed out. `ranks` are the missing ones, as far as known."""

    def __init__(self, message: str, *, remedy: str | None = None, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.ranks = ranks


class EngineError(TramontaneError):
    """The engine stopped; all its requests end with this."""


class CrashedError(EngineError):
    """`num_crashes` replicas crashed while they worked on this request. It may be the cause, so it is not retried here.

    `alone`: the last of them worked on no other request.
    """

    def __init__(self, message: str, *, remedy: str | None = None, num_crashes: int, alone: bool) -> None:
        super().__init__(message, remedy=remedy)
        self.num_crashes = num_crashes
        self.alone = alone


class ReplicaUnavailableError(TramontaneError):
    """No replica can accept or finish the request now; a retry may succeed.

    `crashed`: the replica crashed at work, so one of its requests may be the cause. False for one that froze, lost its connection or
    was stopped. `alone`: this request is known to be the only one that the replica worked on.
    """

    def __init__(self, message: str, *, remedy: str | None = None, crashed: bool = False, alone: bool = False) -> None:
        super().__init__(message, remedy=remedy)
        self.crashed = crashed
        self.alone = alone


class OverloadedError(TramontaneError):
    """The server has as many requests as it may. `retry_after_s`: an estimate of when there is room again."""

    def __init__(self, message: str, *, remedy: str | None = None, retry_after_s: int) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(TramontaneError):
    """The request's deadline, set by the client, has passed. The tokens generated so far are valid."""
