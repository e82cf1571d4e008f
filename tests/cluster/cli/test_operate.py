"""`tramontane drain` against an HTTP server that answers as it is told."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster.cli.main import main
from cluster.cli.operate import ask
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError


class Gateway:
    """Answers every request with `status` and `body`; remembers them in `asked`."""

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
    assert gateway.asked == [("POST", "/admin/replicas/r1/drain", "Bearer k", json.dumps({"grace_s": 2.5}).encode())]
    assert "r1" in capsys.readouterr().out


def test_without_a_grace_the_server_decides(gateway, monkeypatch):
    monkeypatch.delenv("TRAMONTANE_API_KEY", raising=False)
    assert main(["drain", "r1", "--url", gateway.url]) == 0
    assert gateway.asked[0][2:] == (None, b"{}")


def test_an_unknown_replica_is_said_in_the_servers_words(gateway, capsys):
    gateway.status = 404
    gateway.body = json.dumps({"error": {"message": "There is no replica 'r9'; the replicas are: r0."}}).encode()
    assert main(["drain", "r9", "--url", gateway.url]) == 1
    assert capsys.readouterr().err == "tramontane: There is no replica 'r9'; the replicas are: r0.\n"


def test_a_wrong_key_says_where_the_key_goes(gateway):
    gateway.status, gateway.body = 401, b'{"error": {"message": "The key is wrong."}}'
    with pytest.raises(ConfigError, match="--api-key or TRAMONTANE_API_KEY"):
        ask(gateway.url, api_key="wrong")


def test_an_answer_that_is_none_of_ours_is_named_by_its_status(gateway):
    gateway.status, gateway.body = 502, b"<html>proxy</html>"
    with pytest.raises(RequestError, match="502"):
        ask(gateway.url, api_key=None)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no url at all"])
def test_nothing_there_names_the_option(url):
    with pytest.raises(ReplicaUnavailableError, match="--url"):
        ask(url, api_key=None)
