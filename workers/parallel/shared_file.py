"""The memory-mapped file of a SharedMemoryGroup: its layout, how the leader makes it and how the followers find it.

    line 0         MAGIC, size, capacity_bytes
    line 1 + r     rank r's ARRIVED, CLOSED, PID, BORN, SLEEPS, COMPILED: written by rank r only
    then           per rank two buffers, each preceded by a line that says what is in it

A line is a cache line, so that ranks waiting for different ranks do not disturb each other. Knows nothing of collectives.
"""

import mmap
import os
import platform
import time
from pathlib import Path

from workers.errors import GroupError
from workers.process_identity import born_at

FOLDER = Path("/dev/shm")
MAGIC = 0x74_72_61_6D
WORD = 8
LINE = 8  # words in a cache line
# The words of each rank's own line. SLEEPS: until another rank that arrives wakes it. COMPILED: it has compiled collectives.
ARRIVED, CLOSED, PID, BORN, SLEEPS, COMPILED = range(6)


def available() -> bool:
    """Whether this machine can run a SharedMemoryGroup."""
    return os.access(FOLDER, os.W_OK | os.X_OK) and platform.machine() in ("x86_64", "AMD64")


def line(rank: int) -> int:
    """The index of the first word of the rank's own line."""
    return (1 + rank) * LINE


def create(path: Path, num_bytes: int, facts: tuple[int, int, int]) -> mmap.mmap:
    """The leader's mapping. The file gets its name only when it is complete, and replaces a leftover of that name. Raises GroupError."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_bytes)  # a full /dev/shm fails here, not as SIGBUS in the middle of a step
        memory = mmap.mmap(fd, num_bytes)
        words = memoryview(memory).cast("q")
        for i, fact in enumerate(facts):
            words[i] = fact
        words[line(0) + PID] = os.getpid()
        words[line(0) + BORN] = born_at(os.getpid()) or 0
        draft.rename(path)
        return memory
    except OSError as e:
        draft.unlink(missing_ok=True)
        raise GroupError(f"Cannot make {num_bytes} bytes of shared memory at {path}: {e}.") from e
    finally:
        os.close(fd)


def open_existing(path: Path, facts: tuple[int, int, int], *, deadline: float) -> mmap.mmap:
    """A follower's mapping: waits until a living leader has made the file. Raises GroupError after `deadline` (time.monotonic())."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        else:
            try:
                memory = mmap.mmap(fd, 0)
            finally:
                os.close(fd)
            words = memoryview(memory).cast("q")
            if tuple(words[: len(facts)]) != facts:
                raise GroupError(
                    f"{path} belongs to a group of another size or version: {list(words[: len(facts)])}, not {facts}."
                )
            if born_at(words[line(0) + PID]) == words[line(0) + BORN]:
                return memory
        if time.monotonic() > deadline:
            raise GroupError(f"Rank 0 did not make {path} in time.", ranks=(0,))
        time.sleep(0.01)
