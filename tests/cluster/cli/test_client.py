"""The HTTP client of all commands, against real servers on loopback."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from support.servers.certificates import make_pair

from cluster.cli.client import Client
from cluster.system.tls import load
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError, TramontaneError

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Answer(msgspec.Struct):
    x: int


class Server:
    """Answers GET and POST with `status` and `body`, keeps the requests, takes uploads, and offers `content` for download."""

    def __init__(self, tmp_path: Path) -> None:
        self.status, self.body = 200, b'{"x": 1}'
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.uploads: list[dict[str, Any]] = []
        self.content = tmp_path / "content"
        self.content.write_bytes(CONTENT)
        self.break_off_after: int | None = None  # bytes of a download

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/upload", self._upload)
        app.router.add_get("/download", self._download)
        app.router.add_get("/moved", self._moved)
        app.router.add_route("*", "/{path:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, dict(request.headers), await request.read()))
        return web.Response(status=self.status, body=self.body)

    async def _moved(self, request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async def _upload(self, request: web.Request) -> web.Response:
        form: dict[str, Any] = {"length": request.content_length}
        async for part in await request.multipart():
            form[str(part.name)] = (part.filename, part.headers.get("Content-Type"), bytes(await part.read()))
        self.uploads.append(form)
        return web.Response(body=b'{"x": 2}')

    async def _download(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(("GET", dict(request.headers), b""))
        if self.break_off_after is None:
            return web.FileResponse(self.content)
        etag = f'"{self.content.stat().st_mtime_ns:x}-{len(CONTENT):x}"'  # aiohttp's own form
        answer = web.StreamResponse(headers={"Content-Length": str(len(CONTENT)), "ETag": etag})
        await answer.prepare(request)
        await answer.write(CONTENT[: self.break_off_after])
        assert request.transport is not None
        request.transport.close()
        return answer


class Running:
    """A server in a thread of its own; `url` is its address."""

    def __init__(self, server: Server, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner = web.AppRunner(server.app())
        asyncio.run_coroutine_threadsafe(self._open(**options), self._loop).result(10)
        scheme = "https" if options else "http"
        self.url = f"{scheme}://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _open(self, **options: Any) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, **options).start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    running = Running(server)
    yield running.url
    running.close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, api_key="secret") as client:
        yield client


def test_get_and_post_send_the_key_and_return_what_the_type_says(client: Client, server: Server, url: str) -> None:
    assert client.get("/a?b=c", Answer) == Answer(1)
    assert client.post("/a", {"grace_s": 1.5}, Answer).x == 1
    (get, _, _), (post, headers, body) = server.requests
    assert (get, post) == ("GET", "POST")
    assert headers["Authorization"] == "Bearer secret" and headers["Content-Type"] == "application/json"
    assert msgspec.json.decode(body) == {"grace_s": 1.5}
    for key in (None, ""):
        with Client(url, api_key=key) as other:
            other.get("/", Answer)
        assert "Authorization" not in server.requests[-1][1]


def test_the_address_may_end_with_a_slash_or_v1(client: Client, url: str) -> None:
    for address in (f"{url}/", f"{url}/v1", f"{url}/v1/"):
        with Client(address) as other:
            assert other.url == url


def test_redirects_are_followed(client: Client) -> None:
    assert client.get("/moved", Answer).x == 1


def refusal(client: Client, path: str = "/v1/files?limit=1") -> TramontaneError:
    with pytest.raises(TramontaneError) as caught:
        client.get(path, Answer)
    return caught.value


def error(message: str, **parts: object) -> bytes:
    return msgspec.json.encode({"error": {"message": message, **parts}})


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (400, error("No.", param="n", code="bad"), RequestError, "No."),
        (404, error("There is no replica 'r9'.", code=None), RequestError, "There is no replica 'r9'."),
        (404, error("Nothing here.", code="unknown_url"), ConfigError, "has no /v1/files. Give the address"),
        (404, b"<html>Not found</html>", ConfigError, "has no /v1/files. Give the address"),
        (401, error("The key is wrong."), ConfigError, "The key is wrong. Give a key"),
        (
            401,
            b"{}",
            ConfigError,
            "refused the API key. Give a key that may do this with --api-key or TRAMONTANE_API_KEY",
        ),
        (403, error("This endpoint requires an admin key."), ConfigError, "requires an admin key. Give a key"),
        (408, b"", ReplicaUnavailableError, "answered 408 Request Timeout."),
        (429, error("Too many."), ReplicaUnavailableError, "Too many."),
        (500, b"", ReplicaUnavailableError, "answered 500 Internal Server Error."),
        (502, b"<html>proxy</html>", ReplicaUnavailableError, "answered 502 Bad Gateway."),
        (503, error("Starting."), ReplicaUnavailableError, "Starting."),
        (200, b'{"x": "one"}', ConfigError, "Incompatible server version at "),
        (200, b"<html>hello</html>", ConfigError, "Incompatible server version at "),
    ],
)
def test_what_the_server_refuses(
    client: Client, server: Server, status: int, body: bytes, kind: type[TramontaneError], text: str
) -> None:
    server.status, server.body = status, body
    refused = refusal(client)
    assert type(refused) is kind and text in str(refused)
    if status == 400:
        assert isinstance(refused, RequestError) and (refused.param, refused.code) == ("n", "bad")


def test_a_missing_key_is_asked_for(url: str, server: Server) -> None:
    server.status, server.body = 401, b"{}"
    with Client(url) as client:
        assert "requires an API key." in str(refusal(client))


@pytest.mark.parametrize("url", ["no url at all", "localhost:8000", "ftp://h", "http://", "http://h:99999999", ""])
def test_what_is_not_an_address_names_the_option(url: str) -> None:
    with pytest.raises(ConfigError, match=r"--url .* is not the address of a server\. Write it like http://127"):
        Client(url)


def test_a_key_that_no_header_can_carry_is_refused() -> None:
    for key in ("two words", "ключ", "new\nline"):
        with pytest.raises(ConfigError, match="API key contains spaces or non-ASCII"):
            Client("http://127.0.0.1:1", api_key=key)


def test_where_nothing_answers_the_address_and_the_reason_are_named() -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(ReplicaUnavailableError) as e:
        client.get("/", Answer)
    assert e.value.message == "Nothing answers at http://127.0.0.1:1 (Connection refused)."
    assert e.value.remedy is not None and "--url" in e.value.remedy


def test_a_server_that_is_silent_is_given_up(server: Server) -> None:

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, timeout_s=0.05) as client, pytest.raises(ReplicaUnavailableError, match="timed out"):
            client.get("/", Answer)


def test_loopback_is_never_asked_through_a_proxy(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for address in (url, url.replace("127.0.0.1", "localhost")):
        with Client(address) as client:
            assert client.get("/", Answer).x == 1


def test_other_hosts_are_asked_through_the_proxy_unless_no_proxy_says_not(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "direct.invalid")
    with Client("http://gateway.invalid:8000") as client:
        assert client.get("/", Answer).x == 1, "the test server plays the proxy"
    assert server.requests[-1][1]["Host"] == "gateway.invalid:8000"
    with (
        Client("http://direct.invalid:8000") as client,
        pytest.raises(ReplicaUnavailableError, match="Nothing answers"),
    ):
        client.get("/", Answer)


@pytest.mark.parametrize(
    ("url", "no_proxy", "direct"),
    [
        ("http://127.0.0.1:1", "", True),
        ("http://127.8.8.8:1", "", True),
        ("http://[::1]:1", "", True),
        ("http://[::ffff:127.0.0.1]:1", "", True),
        ("http://0.0.0.0:1", "", True),
        ("http://localhost:1", "", True),
        ("http://LOCALHOST.:1", "", True),
        ("http://a.localhost:1", "", True),
        ("http://localhost.example.org:1", "", False),
        ("http://192.0.2.1:1", "", False),
        ("http://192.0.2.1:1", "192.0.2.1", True),
        ("http://192.0.2.1:1", "10.0.0.0/8, 192.0.2.0/24", True),
        ("http://192.0.2.1:1", "192.0.3.0/24,x/y", False),
        ("http://[2001:db8::1]:1", "2001:db8::/32", True),
        ("http://a.invalid:1", "a.invalid", True),
        ("http://b.a.invalid:1", ".a.invalid", True),
        ("http://a.invalid:1", "*", True),
        ("http://ba.invalid:1", "c.invalid", False),
    ],
)
def test_which_hosts_are_asked_directly(
    monkeypatch: pytest.MonkeyPatch, server: Server, url: str, no_proxy: str, direct: bool
) -> None:
    proxy = Running(server)
    try:
        for name in ("http_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("no_proxy", no_proxy)
        monkeypatch.setenv("NO_PROXY", no_proxy)
        with Client(url, timeout_s=0.2) as client:
            if direct:  # nothing answers there
                with pytest.raises(ReplicaUnavailableError):
                    client.get("/", Answer)
            else:
                assert client.get("/", Answer).x == 1, "the test server plays the proxy"
    finally:
        proxy.close()
    assert bool(server.requests) is not direct


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "nonsense://x", "http://[::1"])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("all_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ConfigError, match="The proxy that the environment names cannot be used") as raised:
        Client("http://gateway.invalid:1")
    assert "NO_PROXY" in (raised.value.remedy or "")
    Client("http://localhost:1").close()


def test_https_trusts_the_given_certificate_only(server: Server, tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path, "own")
    running = Running(server, ssl_context=load(cert, key))
    try:
        with Client(running.url, ca_cert=cert) as client:
            assert client.get("/", Answer).x == 1
        with Client(running.url) as client, pytest.raises(ConfigError, match=r"is not trusted .*--ca-cert"):
            client.get("/", Answer)
    finally:
        running.close()


def test_an_upload_is_a_form_with_fields_and_the_file(client: Client, server: Server, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(CONTENT)
    fields = {"purpose": "batch", "expires_after[seconds]": "60"}
    done = client.upload(
        "/upload", source, Answer, filename="run.jsonl", content_type="application/jsonl", fields=fields
    )
    (form,) = server.uploads
    assert done.x == 2
    assert form["purpose"][2] == b"batch" and form["expires_after[seconds]"][2] == b"60"
    assert form["file"] == ("run.jsonl", "application/jsonl", CONTENT)
    assert form["length"] > len(CONTENT), "sent with a length, not in chunks"
    with pytest.raises(OSError, match="none"):
        client.upload("/upload", tmp_path / "none", Answer, filename="a", content_type="b", fields={})


def test_a_download_is_the_whole_file_or_nothing(client: Client, server: Server, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    client.download("/download", target)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.jsonl"]
    target.unlink()
    server.break_off_after = 1000
    with pytest.raises(ReplicaUnavailableError, match="broke off"):
        client.download("/download", target)
    assert not target.exists()
    with pytest.raises(OSError, match="No such file"):
        client.download("/download", tmp_path / "none" / "out")


def test_a_download_that_broke_off_goes_on_with_the_missing_bytes(
    client: Client, server: Server, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    server.break_off_after = 300_000
    with pytest.raises(ReplicaUnavailableError):
        client.download("/download", target)
    server.break_off_after = None
    client.download("/download", target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1][1]["Range"].startswith("bytes=")


def test_a_download_starts_over_when_the_file_has_changed(client: Client, server: Server, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    server.break_off_after = 300_000
    with pytest.raises(ReplicaUnavailableError):
        client.download("/download", target)
    server.break_off_after = None
    changed = CONTENT[::-1] + b"more"
    server.content.write_bytes(changed)
    client.download("/download", target)
    assert target.read_bytes() == changed


def test_what_is_left_of_another_command_is_not_built_on(client: Client, server: Server, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.part").write_bytes(b"of another file")
    client.download("/download", target)
    assert target.read_bytes() == CONTENT
    assert "Range" not in server.requests[-1][1]
