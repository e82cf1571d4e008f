"""The lifeline between real processes: which rank notices which end, how soon, and what is not an end."""

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from support.ranks import lifeline_rank

from workers.errors import GroupError
from workers.protocol import SILENCE_IS_DEATH_S
from workers.rank import lifeline
from workers.rank.lifeline import Lifeline
from workers.rank.process import this_rank

DEATH_SEEN_WITHIN_S = SILENCE_IS_DEATH_S  # measured: a few milliseconds; the rest is a busy machine's
FREEZE_SEEN_WITHIN_S = SILENCE_IS_DEATH_S + 5.0  # measured: 3.2 s


class RankProcessUnderTest:
    def __init__(self, rank: int, port: int, silence: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, lifeline_rank.__file__, str(rank), str(port), silence],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            cwd=Path.cwd(),
        )
        self._events: queue.SimpleQueue[dict] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.port = self.next("ready")["port"]

    def _read(self) -> None:
        for line in self.process.stdout:
            self._events.put(json.loads(line))

    def next(self, event: str, timeout_s: float = 60.0) -> dict:
        try:
            found = self._events.get(timeout=timeout_s)
        except queue.Empty:
            pytest.fail(f"noticed nothing, not {event}; its process: {self._state()}")
        assert found["event"] == event, f"noticed {found}, not {event}"
        return found

    def _state(self) -> str:
        if self.process.poll() is not None:
            return f"ended with {self.process.returncode}"
        self.process.send_signal(signal.SIGUSR1)  # writes what each of its threads does to stderr
        return Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")

    def noticed(self) -> list[dict]:
        """What nobody has asked for with `next`."""
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> float:
        at = time.monotonic()
        self.process.send_signal(number)
        return at


@pytest.fixture
def start():
    ranks: list[RankProcessUnderTest] = []

    def start(size: int, silence: str = "serving") -> list[RankProcessUnderTest]:
        for rank in range(size):
            ranks.append(RankProcessUnderTest(rank, ranks[0].port if ranks else 0, silence))
        return ranks

    yield start
    for rank in ranks:
        rank.process.kill()
        rank.process.wait()
        rank.process.stdin.close()


@pytest.fixture
def tell(capsys):
    """Prints what was measured, whatever pytest captures."""

    def tell(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {line}\n")

    return tell


@pytest.mark.parametrize("silence", ["serving", "loading"])
def test_a_killed_follower_is_named_at_once_and_the_others_are_told_why(start, silence, tell):
    leader, victim, other = start(3, silence)
    killed_at = victim.signal(signal.SIGKILL)
    lost = leader.next("lost")
    assert (lost["rank"], lost["how"]) == (1, "its process died")
    assert lost["at"] - killed_at < DEATH_SEEN_WITHIN_S
    tell(f"SIGKILL of a follower, seen by rank 0 after {1000 * (lost['at'] - killed_at):.1f} ms")
    leader.say("Replica r0 lost rank 1: its process died.")
    assert other.next("failed")["reason"] == "Replica r0 lost rank 1: its process died."
    assert other.noticed() == [], "reported once"


def test_a_process_is_dead_before_its_connections_are(start):
    """As one that has much memory to give back: here a child keeps the connection open forever."""
    leader, victim = start(2)
    victim.say("fork")
    child = victim.next("forked")["child"]
    try:
        killed_at = victim.signal(signal.SIGKILL)
        lost = leader.next("lost")
        assert (lost["rank"], lost["how"]) == (1, "its process died")
        assert lost["at"] - killed_at < DEATH_SEEN_WITHIN_S
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_killed_rank_0_is_noticed_by_every_follower(start, tell):
    leader, *followers = start(3)
    killed_at = leader.signal(signal.SIGKILL)
    for follower in followers:
        lost = follower.next("lost")
        assert (lost["rank"], lost["how"]) == (0, "its process died")
        assert lost["at"] - killed_at < DEATH_SEEN_WITHIN_S
        tell(f"SIGKILL of rank 0, seen by a follower after {1000 * (lost['at'] - killed_at):.1f} ms")


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_in_time_and_killed(start, frozen, tell):
    ranks = start(2)
    stopped_at = ranks[frozen].signal(signal.SIGSTOP)
    lost = ranks[1 - frozen].next("lost")
    assert lost["rank"] == frozen
    assert re.match(r"it has given no sign of life for [3-7]\.\d s", lost["how"])
    assert SILENCE_IS_DEATH_S - 1 < lost["at"] - stopped_at < FREEZE_SEEN_WITHIN_S
    assert ranks[frozen].process.wait(30) == -signal.SIGKILL, "stopped, it would keep its memory forever"
    tell(f"SIGSTOP of rank {frozen}, seen after {lost['at'] - stopped_at:.2f} s")


def test_a_rank_that_loads_may_stand_still_for_longer(start):
    leader, follower = start(2, "loading")
    follower.signal(signal.SIGSTOP)
    time.sleep(SILENCE_IS_DEATH_S + 1.0)  # there is nothing to wait for: nothing must happen
    follower.signal(signal.SIGCONT)
    follower.say("close")
    follower.next("closed")
    assert leader.noticed() == []


def test_a_stall_of_this_process_is_not_the_others_silence(start):
    leader, follower = start(2, "loading")  # the follower is patient, rank 0 is not
    leader.say("expect prompt")
    leader.next("prompt")
    follower.signal(signal.SIGSTOP)
    # Rank 0 finds 4 s of its clock gone and nothing read. It wakes the follower itself: this process may be kept waiting for seconds on a
    # busy machine, and a follower that stays stopped for so long is rightly lost.
    leader.say(f"stall {follower.process.pid}")
    leader.next("stalled")
    follower.say("close")
    follower.next("closed")
    assert leader.noticed() == [], "it took its own stall for the follower's death"


def test_the_connection_stays_open_until_the_last_line_is_sent(listening, monkeypatch):
    """Closed before it, a rank that leaves in order looks like a dead one, and is killed."""
    _, port, noticed = listening
    member = follower(1)
    member.connect(("127.0.0.1", port))
    send = lifeline._Peer.send

    def late(peer, line: bytes, now: float) -> None:
        if line == b"bye\n":
            time.sleep(4 * lifeline.POLL_S)  # the thread that waits for this one would have ended by then
        send(peer, line, now)

    monkeypatch.setattr(lifeline._Peer, "send", late)
    member.close()  # returns when rank 0 has closed its end too
    assert noticed == []


@pytest.mark.parametrize("leaving", [0, 1])
def test_leaving_in_order_is_not_a_death(start, leaving):
    ranks = start(2)
    ranks[leaving].say("close")
    ranks[leaving].next("closed")
    ranks[leaving].signal(signal.SIGKILL)
    other = ranks[1 - leaving]
    other.say("close")
    other.next("closed")
    assert other.noticed() == []


def test_a_failing_follower_says_why(start):
    leader, follower = start(2)
    follower.say("Rank 1 of replica r0 stopped: OutOfMemoryError: no room.")
    assert leader.next("failed")["reason"] == "Rank 1 of replica r0 stopped: OutOfMemoryError: no room."
    follower.signal(signal.SIGKILL)
    leader.say("close")
    leader.next("closed")
    assert leader.noticed() == [], "after a rank gave a reason, its end is not reported again"


@pytest.fixture
def listening():
    noticed = []
    leader = Lifeline(
        0,
        token="right",
        on_lost=lambda *lost: noticed.append(lost),
        on_failed=noticed.append,
        kill=lambda process: noticed.append(process) is None,
    )
    port = leader.listen("127.0.0.1")
    yield leader, port, noticed
    leader.close()
    assert not [t for t in threading.enumerate() if t.name == "lifeline"]


def follower(rank: int, token: str = "right") -> Lifeline:
    return Lifeline(rank, token=token, on_lost=lambda *_: None, on_failed=lambda _: None)


def test_strangers_are_refused_and_do_no_harm(listening, monkeypatch):
    monkeypatch.setattr(lifeline, "HELLO_TIMEOUT_S", 0.3)
    _, port, noticed = listening
    member = follower(1)
    member.connect(("127.0.0.1", port))
    with pytest.raises(GroupError, match="Rank 2 could not reach rank 0's lifeline"):
        follower(2, token="wrong").connect(("127.0.0.1", port))
    with pytest.raises(GroupError, match="it closed the connection"):
        follower(1).connect(("127.0.0.1", port))  # rank 1 is already connected
    for garbage in (b"\n", b"[" * 10_000 + b"\n", b"{}\n", b"x" * 100_000, b"GET / HTTP/1.1\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", port), 10) as stranger:
            stranger.sendall(garbage)
            with contextlib.suppress(ConnectionResetError):  # the last one says nothing, and is closed too
                assert stranger.recv(1) == b"", "a stranger was answered"
    assert noticed == []
    member.close()


def test_the_last_line_arrives_however_much_was_left_unread(listening, monkeypatch):
    monkeypatch.setattr(lifeline, "PARTING_S", 20.0)  # a busy machine may not let this test read within half a second
    leader, port, _ = listening
    with socket.create_connection(("127.0.0.1", port), 10) as member:
        member.sendall(msgspec.json.encode(this_rank(1, "right")) + b"\n")
        member.recv(4096)  # its greeting
        over = threading.Event()

        def chatter() -> None:
            with contextlib.suppress(OSError):
                while not over.is_set():
                    member.sendall(b"\n" * 1000)

        chattering = threading.Thread(target=chatter)
        chattering.start()
        closing = threading.Thread(target=leader.close)
        closing.start()
        received = b""
        while chunk := member.recv(4096):
            received += chunk
        over.set()
    closing.join()
    chattering.join()
    assert received.endswith(b"bye\n")


def test_an_address_where_no_rank_listens_is_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(GroupError, match=f"127.0.0.1:{port}"):
        follower(1).connect(("127.0.0.1", port), timeout_s=2)
