"""The engine thread: drains the inbox, steps the core, hands every step's deltas and cache events to `publish`.

Knows no socket and no torch: the core is anything with the methods of `Core`, and requests arrive in a queue that other threads fill.
While idle, the loop makes the core run a dummy forward pass at intervals, so that readiness always rests on a recent one. A request that
cannot be added ends alone. An exception in a step ends the loop, and `on_failure` is called.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from workers.errors import AdapterNotLoadedError, RequestError
from workers.protocol import CacheEvents, FinishReason, GenerateRequest, TokenDelta
from workers.tracing.log import in_trace

Publish = Callable[[list[TokenDelta], CacheEvents | None], None]

log = logging.getLogger(__name__)

IDLE_HEARTBEAT_S = 0.5


class Core(Protocol):
    """The methods of `workers.engine.core.EngineCore` that the loop calls, all on the engine thread."""

    def add_request(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[TokenDelta]: ...
    def take_cache_events(self) -> CacheEvents | None: ...
    def has_work(self) -> bool: ...
    def heartbeat(self) -> None: ...
    def shutdown(self) -> None: ...


class EngineLoop:
    """Owns the thread that owns the core. `submit`, `abort`, `use`, `call` and `stop` may be called from any thread.

    `on_failure` runs on the engine thread after an exception, kept in `failure`, has ended the loop. Requests that are in the engine
    then get no delta: the replica has ended, and the gateway continues them on another one.
    """

    def __init__(
        self,
        core: Core,
        publish: Publish,
        *,
        on_failure: Callable[[Exception], None] | None = None,
        idle_heartbeat_s: float = IDLE_HEARTBEAT_S,
    ) -> None:
        self.core = core  # read it on the engine thread
        self._publish = publish
        self._on_failure = on_failure
        self._idle_heartbeat_s = idle_heartbeat_s
        self._inbox: queue.SimpleQueue[GenerateRequest | str | Callable[[], Core | None] | None] = queue.SimpleQueue()
        self._stopping = False
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerateRequest) -> None:
        self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        self._inbox.put(request_id)

    def use(self, make: Callable[[], Core]) -> None:
        """Calls `make` on the engine thread, between two steps; what it returns is the core from then on: one with the same requests."""
        self._inbox.put(make)

    def call(self, do: Callable[[], None]) -> None:
        """Calls `do` on the engine thread, between two steps."""
        self._inbox.put(do)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Lets the current step end and shuts the core down. False if the thread is still busy after `timeout_s`."""
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.core.heartbeat()
            last_forward = time.monotonic()
            while not self._stopping:
                self._drain(wait=not self.core.has_work(), until=last_forward + self._idle_heartbeat_s)
                if self.core.has_work():
                    self._step()
                    last_forward = time.monotonic()
                elif not self._stopping and time.monotonic() >= last_forward + self._idle_heartbeat_s:
                    self.core.heartbeat()
                    last_forward = time.monotonic()
            self.core.shutdown()
        except Exception as e:  # the one boundary: whatever failed, this replica has ended
            log.exception("The engine stopped: %s", e)
            self._fail(e)

    def _drain(self, *, wait: bool, until: float) -> None:
        """Handles everything in the inbox; with nothing to do, waits for the first item until `until`."""
        timeout = max(0.0, until - time.monotonic()) if wait else 0.0
        try:
            while True:
                item = self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait()
                timeout = 0.0
                if item is None:
                    self._stopping = True
                elif isinstance(item, str):
                    self.core.abort(item)
                elif callable(item):
                    core = item()
                    self.core = self.core if core is None else core
                else:
                    self._add(item)
        except queue.Empty:
            pass

    def _add(self, request: GenerateRequest) -> None:
        try:
            self.core.add_request(request)
        except RequestError as e:
            elsewhere = isinstance(e, AdapterNotLoadedError)
            self._publish([_error(request.request_id, str(e), refused=not elsewhere, elsewhere=elsewhere)], None)
        except Exception as e:  # one request must not end the engine
            log.exception(
                "Request %s could not be added: %s", request.request_id, e, extra=in_trace(request.traceparent)
            )
            message = "The engine could not accept this request because of an internal error."
            self._publish([_error(request.request_id, message)], None)

    def _step(self) -> None:
        deltas = self.core.step()
        events = self.core.take_cache_events()
        if deltas or events is not None:
            self._publish(deltas, events)

    def _fail(self, failure: Exception) -> None:
        self.failure = failure
        if self._on_failure is not None:
            self._on_failure(failure)


def _error(request_id: str, message: str, *, refused: bool = False, elsewhere: bool = False) -> TokenDelta:
    return TokenDelta(
        request_id=request_id,
        finish_reason=FinishReason.ERROR,
        error=message,
        refused=refused,
        elsewhere=elsewhere,
    )
