"""The gateway's end of the socket to one replica's rank 0.

Knows frames, silence and which stream waits for which request; knows no Ray and no routing. Every open stream ends: with its
final delta, or with ReplicaUnavailableError when the connection breaks or stays silent for SILENCE_IS_DEATH_S, so that
the router can go on elsewhere. A lost connection is tried again until `close`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import msgspec

from workers.errors import ReplicaUnavailableError, RequestError, TramontaneError
from workers.protocol import (
    FRAME_HEADER_BYTES,
    HEARTBEAT_INTERVAL_S,
    SILENCE_IS_DEATH_S,
    Abort,
    CacheEvents,
    Ending,
    EngineFacts,
    FromReplica,
    GenerateRequest,
    Heartbeat,
    Hello,
    LoadReport,
    Refused,
    StepFrame,
    Submit,
    TokenDelta,
    ToReplica,
    encode_frame,
    frame_length,
)

log = logging.getLogger(__name__)

MAX_STEP_S = 30.0  # as long as a collective may take; then even a busy replica is in doubt
MAX_FORWARD_AGE_S = (
    3.0  # beyond this, and twice the last step's time, the replica's readiness is no longer recent knowledge
)
RECONNECT_AFTER_S = 0.5
PROMPT_S = SILENCE_IS_DEATH_S / 2  # rank 0 was heard of a moment ago: several of its heartbeats fit in
_TICK_S = HEARTBEAT_INTERVAL_S / 2
_STANDSTILL_S = _TICK_S + 1.0  # no tick for so long: this process itself stood still

_decoder = msgspec.msgpack.Decoder(FromReplica)
MAX_LAG_BYTES = 4 * 2**20  # about 10,000 plain deltas: more than a model makes while a writer waits for its client
LAG_PATIENCE_S = 5.0  # what comes in a burst, after this process stood still, say, is no reader's fault


class _Inbox:
    """What one stream has not read yet, and about how much memory that takes."""

    __slots__ = ("_lags_since", "_num_bytes", "_queue")

    def __init__(self) -> None:
        self._queue: asyncio.Queue[TokenDelta | TramontaneError] = asyncio.Queue()
        self._num_bytes = 0
        self._lags_since: float | None = None

    def put(self, delta: TokenDelta, now: float) -> bool:
        """False when the reader lags too far behind, and has for a while: then it gets an error in place of all that waited."""
        self._num_bytes += _size_of(delta)
        if self._num_bytes > MAX_LAG_BYTES and not self._queue.empty():
            self._lags_since = self._lags_since or now
        if self._lags_since is not None and now - self._lags_since > LAG_PATIENCE_S:
            while not self._queue.empty():
                self._queue.get_nowait()
            self.end(
                RequestError(
                    "The client reads this stream more slowly than it is made; read faster.", code="slow_reader"
                )
            )
            return False
        self._queue.put_nowait(delta)
        return True

    def end(self, error: TramontaneError) -> None:
        self._queue.put_nowait(error)

    async def get(self) -> TokenDelta:
        """Raises what the stream ended with."""
        item = await self._queue.get()
        if isinstance(item, TramontaneError):
            raise item
        self._num_bytes -= _size_of(item)
        if self._num_bytes <= MAX_LAG_BYTES:
            self._lags_since = None
        return item


def _size_of(delta: TokenDelta) -> int:
    """In bytes, roughly; log-probabilities are what can make it large."""
    size = 400 + 36 * len(delta.token_ids)
    for entries in (delta.logprobs, delta.prompt_logprobs):
        if entries:
            size += sum(200 + 100 * len(entry.top) for entry in entries if entry is not None)
    return size


class ReplicaClient:
    """One replica as the router sees it. Use on one event loop: `await connect()`, then `generate`, at last `await close()`.

    drain_until: time.monotonic() at which running streams must move; None while it is not draining. is_leaving: its node goes away, so
    streams move as soon as there is room elsewhere. Both for the router; nothing here depends on them.
    """

    def __init__(self, replica_id: str, address: tuple[str, int], token: str) -> None:
        self.replica_id = replica_id
        self.drain_until: float | None = None
        self.is_leaving = False
        self._on_frame: Callable[[StepFrame], None] | None = None
        self._cached_blocks: set[bytes] = set()  # named before anyone listened; bounded by the replica's blocks
        self._address = address
        self._token = token
        self._facts: EngineFacts | None = None
        self._load = LoadReport()
        self._load_received = 0.0
        self._streams: dict[str, _Inbox] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._last_received = 0.0
        self._last_sent = 0.0
        self._last_tick = 0.0
        self._stood_still_at = float("-inf")
        self._lost: str = "not connected yet"
        self._condemned: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def facts(self) -> EngineFacts:
        """What start-up learned. Raises ReplicaUnavailableError before the first connection."""
        if self._facts is None:
            raise ReplicaUnavailableError(f"Replica {self.replica_id} has not been reached yet.")
        return self._facts

    @property
    def load(self) -> LoadReport:
        """The newest report; `forward_age_s` counts from when it was received (see `not_ready_reason` for its age now)."""
        return self._load

    @property
    def on_frame(self) -> Callable[[StepFrame], None] | None:
        """Called with every frame. Whoever is set hears at once what was said before: the load and all blocks cached."""
        return self._on_frame

    @on_frame.setter
    def on_frame(self, listener: Callable[[StepFrame], None] | None) -> None:
        self._on_frame = listener
        if listener is not None and self._facts is not None:
            known, self._cached_blocks = self._cached_blocks, set()
            listener(StepFrame(deltas=[], load=self._load, cache=CacheEvents(stored=list(known), reset=True)))

    @property
    def connected(self) -> bool:
        """Whether the socket is open; a silent peer counts as connected until SILENCE_IS_DEATH_S have passed."""
        return self._writer is not None

    @property
    def condemned(self) -> str | None:
        """Why this replica is over for good, if it is."""
        return self._condemned

    @property
    def num_streams(self) -> int:
        """Streams open on this client."""
        return len(self._streams)

    def is_ready(self, now: float) -> bool:
        """Whether all ranks took part in a forward pass a moment ago. now: time.monotonic()."""
        return self.not_ready_reason(now) is None

    def not_ready_reason(self, now: float) -> str | None:
        """A sentence naming replica and rank, or None when ready. now: time.monotonic()."""
        if self._condemned is not None:
            return self._condemned
        if self._writer is None:
            return f"Replica {self.replica_id} has no connection to its rank 0: {self._lost}."
        silent_s = (
            self._last_tick - self._last_received
        )  # up to when this process last ran: its own pauses do not count
        if silent_s > PROMPT_S:
            return f"Replica {self.replica_id} has not been heard of for {silent_s:.1f} s: its rank 0 is silent."
        load = self._load
        if load.stuck_ranks:
            ranks = ", ".join(map(str, load.stuck_ranks))
            return f"Replica {self.replica_id} is waiting for rank {ranks}, which does not answer."
        if load.forward_age_s is None:
            return f"Replica {self.replica_id} has not made a forward pass yet."
        age = load.forward_age_s + now - self._load_received
        # A long step, such as a prefill on a slow machine, is no reason for doubt while no rank keeps the others waiting.
        if load.step_age_s is not None and age < MAX_STEP_S:
            return None
        if age > MAX_FORWARD_AGE_S + 2 * load.last_step_s:
            return f"Replica {self.replica_id} made its last forward pass on all ranks {age:.1f} s ago."
        return None

    def condemn(self, reason: str, *, crashed: bool = False) -> None:
        """Declares the replica dead from better knowledge than the socket's, such as Ray's; every open stream ends.

        The first reason stays: what follows it is usually its consequence. crashed: see ReplicaUnavailableError.
        """
        self._condemned = self._condemned or reason
        self._disconnect(reason, crashed=crashed)

    async def connect(self, timeout_s: float = 10.0) -> EngineFacts:
        """Opens the connection and keeps it. Raises ReplicaUnavailableError when rank 0 cannot be reached or refuses."""
        try:
            async with asyncio.timeout(timeout_s):
                reader = await self._open()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as e:
            raise ReplicaUnavailableError(
                f"Replica {self.replica_id} could not be reached at {self._address[0]}:{self._address[1]}: {e!r}."
            ) from e
        self._task = asyncio.create_task(self._keep(reader), name=f"replica-client-{self.replica_id}")
        return self.facts

    async def close(self) -> None:
        """Ends every open stream and the connection. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        writer, self._writer = self._writer, None
        if writer is not None:
            self._lost = "the gateway closed the connection"
        self._disconnect(self._lost)
        if writer is not None:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        """Yields the request's deltas until one has a finish_reason. Closing it early aborts the request.

        Raises ReplicaUnavailableError when the replica is lost; the deltas yielded so far stand. Raises RequestError for whoever lets
        more than MAX_LAG_BYTES wait.
        """
        if self._writer is None or self._condemned is not None:
            raise ReplicaUnavailableError(self.not_ready_reason(time.monotonic()) or "The replica is gone.")
        assert request.request_id not in self._streams, f"request id {request.request_id} is already in use"
        inbox = self._streams[request.request_id] = _Inbox()
        try:
            self._send(Submit(request=request))
            while True:
                delta = await inbox.get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            # Still listed: neither its last delta nor the end of the connection has come, so rank 0 still works on it.
            if self._streams.pop(request.request_id, None) is not None:
                self._send(Abort(request_id=request.request_id))

    def _send(self, message: ToReplica) -> None:
        if self._writer is not None and not self._writer.transport.is_closing():
            self._writer.write(encode_frame(message))
            self._last_sent = time.monotonic()

    async def _open(self) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(encode_frame(Hello(token=self._token)))
            answer = await _read_message(reader)
            if isinstance(answer, Refused):
                raise ReplicaUnavailableError(f"Replica {self.replica_id} refused the gateway: {answer.reason}")
            if not isinstance(answer, EngineFacts):
                raise ValueError(f"it answered Hello with {type(answer).__name__}")
            first = await _read_message(reader)
            if not isinstance(first, StepFrame):
                raise ValueError(f"its first frame is a {type(first).__name__}")
        except BaseException:
            writer.transport.abort()
            raise
        self._facts = answer
        self._writer = writer  # before the frame: whoever hears it may find the replica ready
        self._take(first)
        self._last_sent = self._last_tick = time.monotonic()
        return reader

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        """Reads until the connection is lost, then tries for a new one, until cancelled or condemned."""
        ticker = asyncio.create_task(self._tick())
        try:
            while True:
                try:
                    while True:
                        message = await _read_message(reader)
                        if isinstance(message, StepFrame):
                            self._take(message)
                        elif isinstance(message, Ending):
                            self.condemn(message.reason, crashed=message.crashed)
                except asyncio.IncompleteReadError:
                    reason = self._lost if self._writer is None else "rank 0 closed the connection"
                    self._disconnect(reason, crashed=self._was_prompt())
                except (OSError, ValueError) as e:
                    crashed = isinstance(e, ConnectionError) and self._was_prompt()
                    self._disconnect(str(e) or type(e).__name__, crashed=crashed)
                except Exception as e:  # nobody would read on, and every stream would wait for ever
                    log.exception("What replica %s sent could not be taken in: %s", self.replica_id, e)
                    self._disconnect(f"what it sent could not be taken in ({e!r})")
                reader = await self._reopen()
        finally:
            ticker.cancel()

    async def _reopen(self) -> asyncio.StreamReader:
        while True:
            await asyncio.sleep(RECONNECT_AFTER_S)
            if self._condemned is not None:
                continue
            try:
                async with asyncio.timeout(SILENCE_IS_DEATH_S):
                    reader = await self._open()
            except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError, ReplicaUnavailableError) as e:
                log.debug("Replica %s is still unreachable: %r", self.replica_id, e)
            except Exception as e:  # as above: the listener's, most likely
                log.exception("What replica %s sent could not be taken in: %s", self.replica_id, e)
                self._disconnect(f"what it sent could not be taken in ({e!r})")
            else:
                log.info("Replica %s is connected again.", self.replica_id)
                return reader

    async def _tick(self) -> None:
        """Heartbeats out; a silent replica is given up."""
        self._last_tick = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            if now - self._last_tick > _STANDSTILL_S:  # the silence is ours, not theirs
                self._last_received = self._stood_still_at = now
            self._last_tick = now
            if self._writer is None:
                continue
            if now - self._last_received > SILENCE_IS_DEATH_S:
                self._disconnect(f"rank 0 has been silent for {now - self._last_received:.1f} s")
            elif now - self._last_sent >= _TICK_S:
                self._send(Heartbeat())

    def _take(self, frame: StepFrame) -> None:
        now = time.monotonic()
        self._last_received = self._load_received = now
        self._load = frame.load
        for delta in frame.deltas:
            if delta.finish_reason is not None:
                inbox = self._streams.pop(delta.request_id, None)
            else:
                inbox = self._streams.get(delta.request_id)
            if (
                inbox is not None
                and not inbox.put(delta, now)
                and self._streams.pop(delta.request_id, None) is not None
            ):
                self._send(Abort(request_id=delta.request_id))
        if self._on_frame is not None:
            self._on_frame(frame)
        elif frame.cache is not None:
            if frame.cache.reset:
                self._cached_blocks.clear()
            self._cached_blocks.difference_update(frame.cache.evicted)
            self._cached_blocks.update(frame.cache.stored)

    def _was_prompt(self) -> bool:
        """Whether both ends were well a moment ago: a connection that breaks then means that rank 0's process died."""
        now = time.monotonic()
        stood_still = now - self._last_tick > _STANDSTILL_S or now - self._stood_still_at < PROMPT_S
        return not stood_still and now - self._last_received < PROMPT_S

    def _disconnect(self, reason: str, *, crashed: bool = False) -> None:
        if self._writer is not None:
            log.warning("Replica %s is lost: %s.", self.replica_id, reason.removesuffix("."))
            self._writer.transport.abort()
            self._writer = None
            self._lost = reason
        streams, self._streams = self._streams, {}
        for inbox in streams.values():
            sentence = self._condemned or f"Replica {self.replica_id} was lost: {reason}."
            inbox.end(ReplicaUnavailableError(sentence, crashed=crashed))


async def _read_message(reader: asyncio.StreamReader) -> FromReplica:
    length = frame_length(await reader.readexactly(FRAME_HEADER_BYTES))
    return _decoder.decode(await reader.readexactly(length))
