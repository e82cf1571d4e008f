"""Names of lease owners: which of them are known to be dead, also among those that version 0.1.0 stored."""

import os
import socket
import subprocess
import sys

import pytest

from cluster.system.process import is_dead, new_owner
from workers.process_identity import this_process


def owner_of_0_1_0(pid: int, born: int | None) -> str:
    me = this_process()
    return f"{socket.gethostname()}/{me.boot_id}/{me.pid_namespace}/{pid}/{born}/0123abcd"


def test_names_differ_and_a_living_process_is_not_dead():
    assert new_owner() != new_owner()
    assert not is_dead(new_owner())


def test_a_stored_owner_of_version_0_1_0_is_read():
    me = this_process()
    assert not is_dead(owner_of_0_1_0(me.pid, me.born))
    assert is_dead(owner_of_0_1_0(me.pid, me.born - 1)), "another process has the pid now"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert is_dead(owner_of_0_1_0(process.pid, 1))


@pytest.mark.parametrize(
    "owner",
    [
        "",
        "me",
        f"{socket.gethostname()}///{os.getpid()}/None/0123abcd",  # as 0.1.0 wrote it where /proc is missing
        f"elsewhere/boot/pid:[1]/{os.getpid()}/1/0123abcd",
        "a/b/c/d/e/f/g/h",
        f"{socket.gethostname()}/boot/pid:[1]/not-a-pid/1/0123abcd",
    ],
    ids=["empty", "one part", "without /proc", "another host", "too many parts", "no pid"],
)
def test_an_owner_that_cannot_be_seen_from_here_is_not_dead(owner):
    assert not is_dead(owner)
