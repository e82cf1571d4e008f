"""How the ranks of a replica notice each other's end, whatever their engines are doing: a TCP connection per follower to rank 0.

A closed connection means that the process died, and is seen at once; SILENCE_IS_DEATH_S of silence that it is frozen or
cut off. A killed process gives back its memory first, its connections later (0.25 s a GB was measured), so a rank on the same host
is also looked at every LOOK_S. Lines of text go both ways:

    follower                                    rank 0
    {"rank": 1, "pid": ..., "token": ...}  -->
                                           <--  {"rank": 0, "pid": ...}    which process to kill, should it freeze
    an empty line every tick              <-->
    "bye", or "failed" and why            <-->                             no death, or a better reason than that

A thread of its own; knows no torch, no group and no engine. A connection serves from joining on, so that a rank that dies while
loading is named too; but until `expect_prompt`, silence is measured with LOADING_SILENCE_S: imports and native set-up code may
hold Python's lock for seconds.
"""

import contextlib
import hmac
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from workers.errors import GroupError
from workers.protocol import HEARTBEAT_INTERVAL_S, SILENCE_IS_DEATH_S
from workers.rank.process import RankProcess, is_alive, is_here, kill_if_here, this_process

log = logging.getLogger(__name__)

LOADING_SILENCE_S = 60.0
LOOK_S = 0.05
MAX_LINE_BYTES = 16 * 1024
HELLO_TIMEOUT_S = 3.0
PARTING_S = 0.5
DIED = "its process died"
_TICK_S = HEARTBEAT_INTERVAL_S / 2
_HEARTBEAT, _BYE, _FAILED = b"\n", b"bye\n", b"failed "


class _Peer:
    """The other end of a connection: `process` is None until its hello has come."""

    def __init__(self, sock: socket.socket, now: float) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.sock = sock
        self.process: RankProcess | None = None
        self.is_here = False  # its pid means something on this host
        self.last_received = now
        self.received = b""

    def greeted(self, process: RankProcess) -> None:
        self.process = process
        self.is_here = is_here(process)

    def send(self, line: bytes) -> None:
        """Never waits. A peer whose buffer is full is silent too; one that is gone is seen by reading."""
        with contextlib.suppress(OSError):
            self.sock.send(line)


class Lifeline:
    """Rank 0 calls `listen`, the others `connect`; at the end all `close`.

    on_lost(rank, how): called once, for the first rank lost, on the lifeline's thread and after its process was killed, if it
    is on this host. `how` ends a sentence that begins with the rank: DIED, or how it froze or was cut off. on_failed(sentence):
    called at most once, with the reason a rank gave for its end. Neither is called after `close`, nor one after the other.
    """

    def __init__(
        self,
        rank: int,
        *,
        token: str,
        on_lost: Callable[[int, str], None],
        on_failed: Callable[[str], None],
        kill: Callable[[RankProcess], bool] = kill_if_here,
    ) -> None:
        self.rank = rank
        self._token = token
        self._on_lost = on_lost
        self._on_failed = on_failed
        self._kill = kill
        self._max_silence_s = LOADING_SILENCE_S
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []
        self._listener: socket.socket | None = None
        self._over = False  # the owner has been told: all that follows is the consequence
        self._closing = threading.Event()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._closing.is_set)
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)

    def listen(self, host: str) -> int:
        """Waits for followers from now on. Returns the port. Raises OSError when the address cannot be bound."""
        listener = self._listener = socket.create_server((host, 0))
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._thread.start()
        return listener.getsockname()[1]

    def connect(self, address: tuple[str, int], timeout_s: float = 10.0) -> None:
        """Says hello to rank 0. Raises GroupError when it does not answer, or refuses."""
        try:
            sock = socket.create_connection(address, timeout_s)
        except OSError as e:
            raise self._unreachable(address, e) from e
        try:
            sock.sendall(msgspec.json.encode(this_process(self.rank, self._token)) + b"\n")
            received = b""
            while b"\n" not in received:
                chunk = sock.recv(MAX_LINE_BYTES)
                if not chunk:
                    raise ConnectionError("it closed the connection")
                received += chunk
            line, _, rest = received.partition(b"\n")
            peer = _Peer(sock, time.monotonic())
            peer.greeted(msgspec.json.decode(line, type=RankProcess))
            peer.received = rest
        except (OSError, msgspec.DecodeError) as e:
            sock.close()
            raise self._unreachable(address, e) from e
        self._add(peer)
        self._thread.start()

    def _unreachable(self, address: tuple[str, int], e: Exception) -> GroupError:
        return GroupError(
            f"Rank {self.rank} could not reach rank 0's lifeline at {address[0]}:{address[1]}: {e}.", ranks=(0,)
        )

    def expect_prompt(self) -> None:
        """From now on SILENCE_IS_DEATH_S counts: start-up, with its long native calls, is over on all ranks."""
        self._max_silence_s = SILENCE_IS_DEATH_S

    def close(self, reason: str | None = None) -> None:
        """Tells the others that this rank leaves in order or, with a reason, that the replica is over. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        line = _BYE if reason is None else _FAILED + " ".join(reason.split()).encode()[: MAX_LINE_BYTES // 2] + b"\n"
        for peer in list(self._peers):
            peer.send(line)
        with contextlib.suppress(OSError):  # the thread has ended by itself
            self._wake_sender.send(b"x")
        if self._thread.ident is None:
            self._release()
        elif self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        try:
            last = next_tick = time.monotonic()
            while not self._closing.is_set():
                for key, _ in self._selector.select(LOOK_S):
                    key.data()
                self._look()
                now = time.monotonic()
                if now < next_tick or self._closing.is_set():
                    continue
                if now - last > _TICK_S + 1.0:  # this process itself stood still: the silence is ours, not theirs
                    for peer in self._peers:
                        peer.last_received = now
                last, next_tick = now, now + _TICK_S
                self._tick(now)
            self._part()
        except Exception as e:  # without it nobody would notice a rank's end any more: better no replica
            log.exception("The lifeline of rank %s broke: %s", self.rank, e)
            self._on_failed(f"The lifeline of rank {self.rank} broke: {e!r}.")
        finally:
            self._release()

    def _part(self) -> None:
        """Reads what still comes until the others have closed too: a socket closed with something unread resets the connection,
        and the reset throws away our last line where the other end has not read it yet."""
        deadline = time.monotonic() + PARTING_S
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_WR)
        for peer in self._peers:
            with contextlib.suppress(OSError):  # gone, or it takes too long: a timeout is an OSError
                while True:
                    peer.sock.settimeout(max(0.001, deadline - time.monotonic()))
                    if not peer.sock.recv(MAX_LINE_BYTES):
                        break

    def _look(self) -> None:
        for peer in list(self._peers):
            process = peer.process
            if process is not None and peer.is_here and not is_alive(process):
                self._read(peer)  # it may have said why
                if peer in self._peers:
                    self._lose(peer, DIED)

    def _tick(self, now: float) -> None:
        for peer in list(self._peers):
            silence = now - peer.last_received
            if silence > (HELLO_TIMEOUT_S if peer.process is None else self._max_silence_s):
                self._lose(peer, f"it has given no sign of life for {silence:.1f} s")
            elif peer.process is not None:
                peer.send(_HEARTBEAT)

    def _accept(self) -> None:
        assert self._listener is not None, "registered by listen"
        with contextlib.suppress(OSError):  # whoever it was left again
            sock, _ = self._listener.accept()
            self._add(_Peer(sock, time.monotonic()))

    def _read(self, peer: _Peer) -> None:
        try:
            chunk = peer.sock.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return
        except (ConnectionResetError, BrokenPipeError):
            chunk = b""
        except OSError as e:
            self._lose(peer, f"the connection to it broke ({e})")
            return
        if not chunk:
            self._lose(peer, DIED)
            return
        peer.last_received = time.monotonic()
        *lines, peer.received = (peer.received + chunk).split(b"\n")
        if len(peer.received) > MAX_LINE_BYTES:
            self._lose(peer, "it sent what no rank would send")
            return
        for line in lines:
            if peer in self._peers and not self._closing.is_set():
                self._take(peer, line)

    def _take(self, peer: _Peer, line: bytes) -> None:
        if peer.process is None:
            self._greet(peer, line)
        elif line + b"\n" == _BYE:
            self._remove(peer)
        elif line.startswith(_FAILED):
            self._remove(peer)
            if not self._over:
                self._over = True
                self._on_failed(line.removeprefix(_FAILED).decode(errors="replace"))

    def _greet(self, peer: _Peer, line: bytes) -> None:
        try:
            process = msgspec.json.decode(line, type=RankProcess)
            known = {p.process.rank for p in self._peers if p.process is not None}
            if not hmac.compare_digest((process.token or "").encode(), self._token.encode()):
                raise ValueError("the token is not this replica's")
            if process.rank in known | {self.rank}:
                raise ValueError(f"rank {process.rank} is here already")
        except (ValueError, RecursionError) as e:  # msgspec's errors are ValueErrors
            log.warning("Refusing a connection to the lifeline: %s", e)
            self._remove(peer)
            return
        peer.greeted(process)
        peer.send(msgspec.json.encode(this_process(self.rank)) + b"\n")

    def _lose(self, peer: _Peer, how: str) -> None:
        self._remove(peer)
        process = peer.process
        if process is not None and not self._over and not self._closing.is_set():  # else it was never one of us
            self._over = True
            self._kill(process)
            self._on_lost(process.rank, how)

    def _add(self, peer: _Peer) -> None:
        self._peers.append(peer)
        self._selector.register(peer.sock, selectors.EVENT_READ, lambda: self._read(peer))

    def _remove(self, peer: _Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.sock)
        peer.sock.close()

    def _release(self) -> None:
        self._selector.close()
        for sock in (*(p.sock for p in self._peers), self._listener, self._wake_receiver, self._wake_sender):
            if sock is not None:
                sock.close()
