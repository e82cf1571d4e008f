"""A server in a network namespace, called with curl from inside its host, and a reader for its streams."""

import json
import subprocess
import threading
import time

from support.hosts.ray_hosts import RayHosts
from support.servers.system_server import API_KEY, Server


class RemoteServer(Server):
    """A server that only commands inside its host can reach."""

    def __init__(self, hosts: RayHosts, *options: str) -> None:
        self._hosts = hosts
        super().__init__("--ray-address", hosts.address, *options, prefix=hosts.prefix(0), env=hosts.env)

    def curl(self, path: str, body: dict | None = None, *more: str, url: str | None = None) -> subprocess.Popen:
        command = [*self._hosts.prefix(0), "curl", "-sS", "-N", "--max-time", "300", f"{url or self.url}{path}", *more]
        command += ["-H", f"Authorization: Bearer {API_KEY}", "-H", "Content-Type: application/json"]
        if body is not None:
            command += ["-d", json.dumps(body)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def get(self, path: str, *, url: str | None = None) -> tuple[int, str]:
        out, err = self.curl(path, None, "-w", "\n%{http_code}", url=url).communicate()
        assert out, err
        text, _, status = out.rpartition("\n")
        return int(status), text


def text_of(process: subprocess.Popen) -> str:
    reader = Reader(process)
    reader.join(300)
    return reader.text


class Reader(threading.Thread):
    """Reads a stream from curl's output. `text` is None until the stream is complete."""

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self._process = process
        self.num_events = 0
        self.longest_pause = 0.0
        self.text: str | None = None
        self.start()

    def run(self) -> None:
        parts, last = [], None
        for line in self._process.stdout:
            now = time.monotonic()
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    parts.append(str(event))
                    continue
                parts.append(event["choices"][0]["text"])
                self.num_events += 1
                self.longest_pause = max(self.longest_pause, now - (last or now))
                last = now
            elif line.startswith("data: [DONE]"):
                self.text = "".join(parts)


def nodes_of(replica: dict) -> list[str]:
    return [rank["node_ip"] for rank in replica["ranks"]]
