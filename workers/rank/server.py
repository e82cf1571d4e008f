"""Rank 0's socket: requests and aborts in, one frame per engine step and connection out.

An asyncio server on a thread of its own, so that heartbeats go out, and say so, while the engine thread waits in a collective. The engine
thread sends its steps itself: see FrameSender.
Knows connections, which connection submitted what, and which blocks are cached; knows no torch and no engine: it is given callables.
A connection opens with Hello and the replica's secret. A client that breaks the protocol loses its connection and nothing else happens;
what it had submitted is aborted.
"""

import asyncio
import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Callable

import msgspec

from workers.heartbeat import TICK_S
from workers.protocol import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    SILENCE_IS_DEATH_S,
    Abort,
    CacheEvents,
    Ending,
    EngineFacts,
    GenerateRequest,
    Heartbeat,
    Hello,
    LoadReport,
    Refused,
    StepFrame,
    Submit,
    TokenDelta,
    encode_frame,
)
from workers.rank.connection import Connection, read_message
from workers.rank.stuck_ranks import StuckRanks

log = logging.getLogger(__name__)

MAX_HELLO_BYTES = 4096
ORPHAN_AFTER_S = 600.0  # without any gateway for this long, no gateway will connect again
LINGER_S = 1.0  # for clients to read the end and close; one that is slower may lose the end to a reset
FLUSH_S = 1.0  # for the last frames of a connection that is slow to read them


class ProtocolViolation(Exception):
    """The client sent what this protocol does not allow; the message goes to the log."""


class StreamServer:
    """Serves gateways from its own thread. `publish` is called from the engine thread, everything else from the owner's.

    submit, abort: hand a request, or the id of one to forget, to the engine thread; must not block.
    load: returns the engine's LoadReport; called on the server's thread. Its `stuck_ranks` are the ranks waited for at that instant;
    only those that `StuckRanks` confirms are passed on.
    on_orphaned: called once, on the server's thread, when the last gateway disconnected ORPHAN_AFTER_S ago. Gets the reason.
    """

    def __init__(
        self,
        facts: EngineFacts,
        token: str,
        *,
        submit: Callable[[GenerateRequest], None],
        abort: Callable[[str], None],
        load: Callable[[], LoadReport],
        on_orphaned: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._facts = facts
        self._token = token.encode()
        self._submit = submit
        self._abort = abort
        self._load = load
        self._on_orphaned = on_orphaned
        self._alone_since: float | None = None  # None also before the first gateway connects
        # Guards what both threads use: from here to `_connections`, and what each of these holds.
        self._lock = threading.Lock()
        self._cached: dict[bytes, None] = {}  # every block the prefix cache can find, in the order of storing
        self._stuck_ranks = StuckRanks()
        self._connections: dict[str, Connection] = {}  # by prefix
        self._ending: bytes | None = None  # the frame that says why this server ends, once it does
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_accepted = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listens, and returns the address. Raises OSError when the address cannot be bound."""
        started = threading.Event()
        outcome: list[tuple[str, int] | BaseException] = []

        def run() -> None:
            try:
                asyncio.run(self._serve(host, port, outcome, started))
            except BaseException as e:
                log.exception("The stream server ended: %s", e)
                outcome.append(e)
                started.set()

        self._thread = threading.Thread(target=run, name="stream-server", daemon=True)
        self._thread.start()
        started.wait()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def publish(self, deltas: list[TokenDelta], events: CacheEvents | None = None) -> None:
        """Sends each delta to the connection that submitted its request; drops those without one. Events go to every connection,
        with its next frame. Never waits for a client.
        """
        with self._lock:
            if events is not None:
                self._remember(events)
            batches: dict[Connection, list[TokenDelta]] = {}
            connections, replace = self._connections, msgspec.structs.replace
            prefix = ""
            connection: Connection | None = None
            batch: list[TokenDelta] = []
            for delta in deltas:
                own_id = delta.request_id
                if not prefix or not own_id.startswith(prefix):  # most come from one gateway
                    prefix = own_id.partition("/")[0] + "/"
                    connection, batch = connections.get(prefix), []
                    if connection is not None:
                        batch = batches.setdefault(connection, [])
                request_id = own_id[len(prefix) :]
                if connection is None or request_id not in connection.requests:
                    continue  # aborted or disconnected a moment ago
                if delta.finish_reason is not None:
                    connection.requests.discard(request_id)
                batch.append(replace(delta, request_id=request_id))
            if any(batches.values()):
                now = time.monotonic()
                load = self._report(now)
                for connection, batch in batches.items():
                    if batch:
                        connection.send_deltas(batch, load, now)

    def close(self, timeout_s: float = 5.0, *, reason: str | None = None, crashed: bool = True) -> None:
        """Sends what is queued and then Ending, if there is a reason, closes every connection and ends the thread. Idempotent."""
        self._call_soon(self._end, None if reason is None else Ending(reason=reason, crashed=crashed))
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _call_soon(self, callback: Callable[..., object], *args: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: no client is connected any more
                self._loop.call_soon_threadsafe(callback, *args)

    def _end(self, ending: Ending | None) -> None:
        assert self._stop is not None, "the loop runs, so it has been set"
        with self._lock:
            if self._stop.is_set():
                return
            self._stop.set()
            self._ending = None if ending is None else encode_frame(ending)
            for connection in self._connections.values():
                self._finish(connection)

    def _finish(self, connection: Connection) -> None:
        if self._ending is not None:
            connection.send(self._ending, time.monotonic())
        connection.finish()

    async def _serve(
        self,
        host: str,
        port: int,
        outcome: list[tuple[str, int] | BaseException],
        started: threading.Event,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._accept, host, port)
        ticker = asyncio.create_task(self._tick())
        outcome.append(server.sockets[0].getsockname()[:2])
        started.set()
        try:
            await self._stop.wait()
        finally:
            server.close()
            ticker.cancel()
            connections = list(self._connections.values())
            # A connection that is closed with unread data is reset, and the client loses the last frames.
            await asyncio.wait([*self._tasks] or [ticker], timeout=LINGER_S)
            await asyncio.wait([asyncio.create_task(c.finished()) for c in connections] or [ticker], timeout=FLUSH_S)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(ticker, *self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._num_accepted += 1
        connection = Connection(self._num_accepted, writer, time.monotonic())
        try:
            if await self._handshake(connection, reader):
                await self._read(connection, reader)
        except (ProtocolViolation, msgspec.DecodeError, ValueError) as e:
            log.warning("Closing %s: %s", connection.peer, e)
        except (asyncio.IncompleteReadError, OSError, TimeoutError):
            log.info("Connection from %s ended.", connection.peer)
        finally:
            with self._lock:
                if self._connections.pop(connection.prefix, None) is not None and not self._connections:
                    self._alone_since = time.monotonic()
            for request_id in connection.requests:
                self._abort(connection.prefix + request_id)
            connection.close()
            self._tasks.discard(task)

    async def _handshake(self, connection: Connection, reader: asyncio.StreamReader) -> bool:
        async with asyncio.timeout(SILENCE_IS_DEATH_S):
            message = await read_message(reader, MAX_HELLO_BYTES)
        reason = None
        if not isinstance(message, Hello):
            raise ProtocolViolation(f"its first frame is {type(message).__name__}, not Hello")
        if not hmac.compare_digest(message.token.encode(), self._token):
            reason = "The token is not this replica's."
        elif message.version != PROTOCOL_VERSION:
            reason = f"This replica speaks protocol {PROTOCOL_VERSION}, the gateway {message.version}."
        now = time.monotonic()
        connection.clock.received(now)
        if reason is not None:
            log.warning("Refusing %s: %s", connection.peer, reason)
            connection.send(encode_frame(Refused(reason=reason)), now)
            return False
        connection.send(encode_frame(self._facts), now)
        with self._lock:
            # What the engine thread publishes from here on comes after what is known now.
            known = CacheEvents(stored=list(self._cached), reset=True) if self._facts.enable_prefix_caching else None
            connection.send(encode_frame(StepFrame(deltas=[], load=self._report(now), cache=known)), now)
            self._connections[connection.prefix] = connection
            assert self._stop is not None, "the loop runs, so it has been set"
            if self._stop.is_set():  # since this connection was accepted
                self._finish(connection)
        self._alone_since = None
        return True

    async def _read(self, connection: Connection, reader: asyncio.StreamReader) -> None:
        while True:
            message = await read_message(reader, MAX_FRAME_BYTES)
            connection.clock.received(time.monotonic())
            match message:
                case Submit(request=request):
                    with self._lock:
                        if request.request_id in connection.requests:
                            raise ProtocolViolation(f"it submitted the request id {request.request_id!r} twice")
                        connection.requests.add(request.request_id)
                    own_id = connection.prefix + request.request_id
                    self._submit(msgspec.structs.replace(request, request_id=own_id))
                case Abort(request_id=request_id):
                    with self._lock:
                        is_known = request_id in connection.requests
                        connection.requests.discard(request_id)
                    if is_known:
                        self._abort(connection.prefix + request_id)
                case Heartbeat():
                    pass
                case Hello():
                    raise ProtocolViolation("it said Hello twice")

    def _remember(self, events: CacheEvents) -> None:
        for block_hash in events.evicted:
            self._cached.pop(block_hash, None)
        self._cached.update(dict.fromkeys(events.stored))
        for connection in self._connections.values():
            connection.unsent_events.add(events)

    async def _tick(self) -> None:
        """Sends heartbeats and waiting events; closes silent clients."""
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            with self._lock:
                load = self._report(now)
                for connection in self._connections.values():
                    self._keep_alive(connection, load, now)
            if self._alone_since is not None and now - self._alone_since > ORPHAN_AFTER_S:
                self._alone_since = None
                self._on_orphaned(f"no gateway has been connected for {ORPHAN_AFTER_S:g} s")

    def _keep_alive(self, connection: Connection, load: LoadReport, now: float) -> None:
        connection.clock.tick(now)
        events = connection.unsent_events.take()
        if (silence_s := connection.clock.silence_s(now)) > SILENCE_IS_DEATH_S:
            log.warning("Closing %s: silent for %.1f s.", connection.peer, silence_s)
            connection.drop()
        elif events is not None or connection.clock.is_heartbeat_due(now):
            connection.send(encode_frame(StepFrame(deltas=[], load=load, cache=events)), now)

    def _report(self, now: float) -> LoadReport:
        load = self._load()
        stuck = self._stuck_ranks.update(load.stuck_ranks, now)
        return load if stuck == load.stuck_ranks else msgspec.structs.replace(load, stuck_ranks=stuck)
