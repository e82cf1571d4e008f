"""The real listener and application over a fake replica in a process of their own, with few file descriptors if wanted, as a target for
attacks on connections. Knows no attack."""

import asyncio
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import psutil

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[2])]

from cluster.system.log import setup_logging
from cluster.system.tls import open_certificate
from support.servers.listening import open_listener


class ListenerProcess:
    """max_descriptors: the hard limit on open files, set after start-up. log: what it logged so far. options: of open_listener."""

    def __init__(
        self, *, max_descriptors: int | None = None, certificate: tuple[Path, Path] | None = None, **options: Any
    ) -> None:
        arguments = {"max_descriptors": max_descriptors, "certificate": certificate, "options": options}
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(arguments, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self._lines.extend(self._process.stderr), daemon=True)
        self._reader.start()
        port = self._process.stdout.readline()
        assert port, f"the process did not start:\n{self.log}"
        self.port = int(port)
        self._info = psutil.Process(self._process.pid)

    @property
    def log(self) -> list[str]:
        return list(self._lines)

    def num_connections(self) -> int:
        """Sockets that the process has open, the listening one not counted."""
        return sum(c.status != "LISTEN" for c in self._info.net_connections("tcp"))

    def cpu_s(self) -> float:
        return sum(self._info.cpu_times()[:2])

    def rss_bytes(self) -> int:
        return self._info.memory_info().rss

    def until_gone(self, *, timeout_s: float) -> float:
        """Waits until it has no connection any more. Returns the seconds that took; infinite if some are left."""
        began = time.monotonic()
        while self.num_connections():
            if time.monotonic() - began > timeout_s:
                return float("inf")
            time.sleep(0.2)
        return time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # the process ends then
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(5)


async def main(max_descriptors: int | None, certificate: tuple[str, str] | None, options: dict[str, Any]) -> None:
    """Serves until stdin ends."""
    setup_logging("info")
    tls = open_certificate(*certificate) if certificate else None
    await asyncio.to_thread(int)  # the thread pool's first thread
    if max_descriptors is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_descriptors, max_descriptors))
    async with open_listener(tls=None if tls is None else tls.context, **options) as listener:
        print(listener.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
