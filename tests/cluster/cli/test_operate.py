"""`tramontane drain` against an HTTP server with prepared answers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster.cli.main import main


class Gateway:
    """Answers every request with `status` and `body`; records the requests in `asked`."""

    def __init__(self) -> None:
        self.status, self.body = 200, b"{}"
        self.asked: list[tuple[str, str, str | None, bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                outer.asked.append((self.command, self.path, self.headers.get("Authorization"), body))
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(outer.body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None: ...  # type: ignore[override]

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


def test_drain_posts_the_grace_with_the_key(gateway, capsys):
    assert main(["drain", "r1", "--grace", "2.5", "--url", gateway.url, "--api-key", "k"]) == 0
    ((method, path, key, body),) = gateway.asked
    assert (method, path, key) == ("POST", "/admin/replicas/r1/drain", "Bearer k")
    assert json.loads(body) == {"grace_s": 2.5}
    assert "r1" in capsys.readouterr().out


def test_without_a_grace_the_server_decides(gateway, monkeypatch):
    monkeypatch.delenv("TRAMONTANE_API_KEY", raising=False)
    assert main(["drain", "r1", "--url", gateway.url]) == 0
    assert gateway.asked[0][2:] == (None, b"{}")


def test_an_unknown_replica_is_reported_in_the_servers_words(gateway, capsys):
    gateway.status = 404
    gateway.body = json.dumps({"error": {"message": "There is no replica 'r9'; the replicas are: r0."}}).encode()
    assert main(["drain", "r9", "--url", gateway.url]) == 1
    assert capsys.readouterr().err == "tramontane: There is no replica 'r9'; the replicas are: r0.\n"
