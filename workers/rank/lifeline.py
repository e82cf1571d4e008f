"""How the ranks of a replica notice each other's end, whatever their engines are doing: a TCP connection from each follower to rank 0.

A closed connection means that the process died, and is seen at once. SILENCE_IS_DEATH_S of silence means that it is frozen or cut off.
A killed process gives back its memory first and closes its connections later (0.25 s per GB was measured), so ranks on the same host
also check each other's process every POLL_S. Lines of text go both ways:

    follower                                         rank 0
    {"rank": 1, "process": ..., "token": ...}  -->
                                               <--   {"rank": 0, "process": ...}   the process to kill, should it freeze
    an empty line every tick                  <-->
    "bye", or "failed" and why                <-->                                 not a death, or a better reason than that

Runs on a thread of its own; knows no torch, no group and no engine. A connection counts from joining on, so that a rank that dies while
loading is named too. But until `expect_prompt`, LOADING_SILENCE_S of silence are allowed: imports and native set-up code may hold
Python's lock for seconds.
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
from workers.heartbeat import TICK_S, PeerClock
from workers.process_identity import ProcessIdentity, is_alive, is_here
from workers.protocol import LOADING_SILENCE_S, SILENCE_IS_DEATH_S
from workers.rank.process import RankProcess, kill_if_here, this_rank

log = logging.getLogger(__name__)

POLL_S = 0.05
MAX_LINE_BYTES = 16 * 1024
HELLO_TIMEOUT_S = 3.0
PARTING_S = 0.5
DIED = "its process died"
_HEARTBEAT, _BYE, _FAILED = b"\n", b"bye\n", b"failed "


class _Peer:
    """The other end of a connection: `member` is None until its hello has come."""

    def __init__(self, sock: socket.socket, now: float) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.sock = sock
        self.clock = PeerClock(now)
        self.member: RankProcess | None = None
        self.is_here = False  # its pid means something on this host
        self.received = b""

    def greeted(self, member: RankProcess) -> None:
        self.member = member
        self.is_here = is_here(member.process)

    def send(self, line: bytes, now: float) -> None:
        """Never waits. A peer whose buffer is full is silent too; a peer that has ended is noticed by reading."""
        with contextlib.suppress(OSError):
            self.sock.send(line)
            self.clock.sent(now)


class Lifeline:
    """Rank 0 calls `listen`, the others `connect`; at the end all `close`.

    on_lost(rank, how): called once, for the first rank lost, on the lifeline's thread and after its process was killed, if it
    is on this host. `how` ends a sentence that begins with the rank: DIED, or how it froze or was cut off. on_failed(message):
    called at most once, with the reason a rank gave for its end. Only one of the two is called, and neither after `close`.
    """

    def __init__(
        self,
        rank: int,
        *,
        token: str,
        on_lost: Callable[[int, str], None],
        on_failed: Callable[[str], None],
        kill: Callable[[ProcessIdentity], bool] = kill_if_here,
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
        self._over = False  # the owner has been told: everything after that is a consequence
        self._closing = threading.Event()  # nothing is an end from now on
        self._parting = threading.Event()  # and our last line is on its way
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
            sock.sendall(msgspec.json.encode(this_rank(self.rank, self._token)) + b"\n")
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
            peer.send(line, time.monotonic())
        self._parting.set()
        with contextlib.suppress(OSError):  # the thread has ended by itself
            self._wake_sender.send(b"x")
        if self._thread.ident is None:
            self._release()
        elif self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        try:
            next_tick = time.monotonic()
            while not self._parting.is_set():
                for key, _ in self._selector.select(POLL_S):
                    key.data()
                self._check_processes()
                now = time.monotonic()
                if now < next_tick or self._closing.is_set():
                    continue
                next_tick = now + TICK_S
                self._tick(now)
            self._part()
        except Exception as e:  # without a lifeline the end of a rank would go unnoticed: better to end the replica
            log.exception("The lifeline of rank %s broke: %s", self.rank, e)
            self._on_failed(f"The lifeline of rank {self.rank} broke: {e!r}.")
        finally:
            self._release()

    def _part(self) -> None:
        """Reads what still comes until the others have closed too: a socket closed with something unread resets the connection,
        and the reset discards our last line if the other end has not read it yet."""
        deadline = time.monotonic() + PARTING_S
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_WR)
        for peer in self._peers:
            with contextlib.suppress(OSError):  # closed, or it takes too long: a timeout is an OSError
                while True:
                    peer.sock.settimeout(max(0.001, deadline - time.monotonic()))
                    if not peer.sock.recv(MAX_LINE_BYTES):
                        break

    def _check_processes(self) -> None:
        for peer in list(self._peers):
            if peer.member is not None and peer.is_here and not is_alive(peer.member.process):
                self._read(peer)  # its last line may give the reason
                if peer in self._peers:
                    self._lose(peer, DIED)

    def _tick(self, now: float) -> None:
        for peer in list(self._peers):
            peer.clock.tick(now)
            silence_s = peer.clock.silence_s(now)
            if silence_s > (HELLO_TIMEOUT_S if peer.member is None else self._max_silence_s):
                self._lose(peer, f"it has given no sign of life for {silence_s:.1f} s")
            elif peer.member is not None and peer.clock.is_heartbeat_due(now):
                peer.send(_HEARTBEAT, now)

    def _accept(self) -> None:
        assert self._listener is not None, "registered by listen"
        with contextlib.suppress(OSError):  # the client has disconnected again
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
        peer.clock.received(time.monotonic())
        *lines, peer.received = (peer.received + chunk).split(b"\n")
        if len(peer.received) > MAX_LINE_BYTES:
            self._lose(peer, "it sent data that is not a rank's")
            return
        for line in lines:
            if peer in self._peers and not self._closing.is_set():
                self._handle(peer, line)

    def _handle(self, peer: _Peer, line: bytes) -> None:
        if peer.member is None:
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
            member = msgspec.json.decode(line, type=RankProcess)
            known = {p.member.rank for p in self._peers if p.member is not None}
            if not hmac.compare_digest((member.token or "").encode(), self._token.encode()):
                raise ValueError("the token is not this replica's")
            if member.rank in known | {self.rank}:
                raise ValueError(f"rank {member.rank} is already connected")
        except (ValueError, RecursionError) as e:  # msgspec's errors are ValueErrors
            log.warning("Refusing a connection to the lifeline: %s", e)
            self._remove(peer)
            return
        peer.greeted(member)
        peer.send(msgspec.json.encode(this_rank(self.rank)) + b"\n", time.monotonic())

    def _lose(self, peer: _Peer, how: str) -> None:
        self._remove(peer)
        member = peer.member
        if member is not None and not self._over and not self._closing.is_set():  # None: not one of our ranks
            self._over = True
            self._kill(member.process)
            self._on_lost(member.rank, how)

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
