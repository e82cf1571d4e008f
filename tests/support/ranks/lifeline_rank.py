"""One rank of test_lifeline.py with nothing but its lifeline, in a process of its own: reports as lines of JSON what it notices, and when.

Arguments: rank, rank 0's port (0 on rank 0 itself), whether silence is measured as in a serving replica. Commands come by line:
`close`, `stall PID` (stands still for 4 s without letting its threads run, then wakes the stopped process PID), `fork` (leaves its
connections to a child), `expect prompt`, and anything else is the reason of a failure.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time

from workers.rank.lifeline import Lifeline

TOKEN = "the replica's secret"


def say(**what: object) -> None:
    # time.monotonic() is the same clock in all processes of a host.
    os.write(1, json.dumps({"at": time.monotonic(), **what}).encode() + b"\n")


def main(rank: int, port: int, serving: bool) -> None:
    lifeline = Lifeline(
        rank,
        token=TOKEN,
        on_lost=lambda lost, how: say(event="lost", rank=lost, how=how),
        on_failed=lambda reason: say(event="failed", reason=reason),
    )
    if serving:
        lifeline.expect_prompt()
    if rank == 0:
        port = lifeline.listen("127.0.0.1")
    else:
        lifeline.connect(("127.0.0.1", port))
    say(event="ready", port=port)
    for line in sys.stdin:
        match line.split():
            case ["stall", pid]:
                ctypes.PyDLL(None).sleep(4)  # PyDLL keeps Python's lock
                os.kill(int(pid), signal.SIGCONT)
                say(event="stalled")
            case ["fork"]:
                if (child := os.fork()) == 0:
                    time.sleep(60)
                    os._exit(0)
                say(event="forked", child=child)
            case ["expect", "prompt"]:
                lifeline.expect_prompt()
                say(event="prompt")
            case words:
                lifeline.close(None if words == ["close"] else " ".join(words))
                say(event="closed")


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "serving")
