"""Ending a frozen rank must never end another process."""

import signal
import subprocess
import sys

from workers.parallel.shared_file import birth
from workers.rank.process import RankProcess, is_alive, is_here, kill_if_here, this_process


def test_only_the_very_process_is_killed():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        me = this_process(0)
        assert is_here(me)
        assert is_alive(me)
        its = RankProcess(rank=1, pid=process.pid, born=birth(process.pid), host=me.host)
        assert its.born is not None
        assert not kill_if_here(RankProcess(rank=1, pid=its.pid, born=its.born - 1, host=its.host)), "a reused pid"
        assert not kill_if_here(RankProcess(rank=1, pid=its.pid, born=None, host=its.host)), "its birth is not known"
        assert not kill_if_here(RankProcess(rank=1, pid=its.pid, born=its.born, host="another host")), "elsewhere"
        assert not kill_if_here(me), "oneself"
        assert process.poll() is None
        assert kill_if_here(its)
        assert process.wait(10) == -signal.SIGKILL
        assert not kill_if_here(its), "dead already"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
