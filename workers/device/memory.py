"""How much memory this machine, or the container around this process, has and has available. Takes less than a millisecond.

Reads /proc and /sys/fs/cgroup; knows no model. The kernel's words: MemAvailable counts what it can take back from caches.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of RAM. `available`: what new processes can take without swapping."""

    total_bytes: int
    available_bytes: int


def read_memory(root: Path = ROOT) -> Memory | None:
    """The least of the machine's memory and the limits of the control groups around this process. None where the system does not say.

    root: where proc/ and sys/ are. Both versions of control groups are read.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text()
        total, available = (
            int(_search(rf"^{name}:\s+(\d+) kB", meminfo)) * 1024 for name in ("MemTotal", "MemAvailable")
        )
    except (OSError, ValueError):
        return None
    for limit, used in _limits(root):
        total, available = min(total, limit), min(available, limit - used)
    return Memory(total_bytes=total, available_bytes=max(0, available))


def gigabytes(num_bytes: int) -> str:
    """In decimal gigabytes, as clouds and data sheets write them: "14.5 GB", "0.50 GB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of every control group around this process that has a limit."""
    groups = root / "sys/fs/cgroup"
    for folder in _folders(groups, _own_group(root, "")):
        yield from _limit(folder, "memory.max", "memory.current", "inactive_file")
    for folder in _folders(groups / "memory", _own_group(root, "memory")):
        yield from _limit(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _limit(folder: Path, limit: str, current: str, cached: str) -> Iterator[tuple[int, int]]:
    with contextlib.suppress(OSError, ValueError):  # no such files, or no limit: "max" is not a number
        num_bytes = int((folder / limit).read_text())
        # The kernel gives the page cache back when a process needs the memory.
        reclaimable = int(_search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text()))
        yield num_bytes, int((folder / current).read_text()) - reclaimable


def _own_group(root: Path, controller: str) -> str:
    """This process's group from /proc/self/cgroup, whose lines are "0::/a/b" in version 2 and "4:memory:/a/b" in version 1."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(","):
                return path
    return "/"


def _folders(top: Path, group: str) -> Iterator[Path]:
    """The group's folder and those around it. In a container the path may be the host's, which is not mounted there; the top one is."""
    folder = top / group.strip("/")
    if ".." not in folder.parts:
        while folder != top:
            yield folder
            folder = folder.parent
    yield top


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"nothing matches {pattern}")
    return match[1]
