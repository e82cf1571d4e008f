"""What tells a process from a later one with the same pid, and from one elsewhere."""

import os
import subprocess
import sys

import msgspec

from workers.process_identity import ProcessIdentity, born_at, is_alive, is_here, is_known_dead, this_process


def test_this_process_is_here_and_alive():
    me = this_process()
    assert (me.pid, me.born) == (os.getpid(), born_at(os.getpid()))
    assert is_here(me) and is_alive(me) and not is_known_dead(me)
    assert msgspec.json.decode(msgspec.json.encode(me), type=ProcessIdentity) == me


def test_a_later_process_with_the_same_pid_is_another_one():
    earlier = msgspec.structs.replace(this_process(), born=this_process().born - 1)
    assert is_here(earlier) and is_known_dead(earlier)


def test_a_killed_process_is_dead_before_it_is_reaped():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    its = msgspec.structs.replace(this_process(), pid=process.pid, born=born_at(process.pid))
    assert is_alive(its)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert is_known_dead(its)
    process.wait()
    process.stdin.close()
    assert is_known_dead(its)


def test_nothing_is_known_about_a_process_elsewhere():
    me = this_process()
    for elsewhere in ({"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"boot_id": None}, {"born": None}):
        other = msgspec.structs.replace(me, pid=2**22 - 1, **elsewhere)
        assert not is_here(other)
        assert not is_known_dead(other), f"{elsewhere} cannot be seen from here"
