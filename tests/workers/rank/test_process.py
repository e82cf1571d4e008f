"""Ending a frozen rank must never end another process."""

import signal
import subprocess
import sys

import msgspec

from workers.process_identity import born_at, this_process
from workers.rank.process import kill_if_here


def test_only_the_very_process_is_killed():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        its = msgspec.structs.replace(this_process(), pid=process.pid, born=born_at(process.pid))
        for other, why in (
            ({"born": its.born - 1}, "a reused pid"),
            ({"born": None}, "its birth is not known"),
            ({"boot_id": "another boot"}, "another host"),
            ({"boot_id": None}, "its host is not known"),
            ({"pid_namespace": "pid:[1]"}, "another container"),
        ):
            assert not kill_if_here(msgspec.structs.replace(its, **other)), why
        assert not kill_if_here(this_process()), "oneself"
        assert process.poll() is None
        assert kill_if_here(its)
        assert process.wait(10) == -signal.SIGKILL
        assert not kill_if_here(its), "already dead"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
