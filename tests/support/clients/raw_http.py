"""Sends bytes to a socket and parses the response strictly as HTTP, without a client library."""

import contextlib
import io
import json
import select
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse

# Statuses that do not mean a refused request: the server is busy, or the requested deadline has passed.
ALLOWED_5XX = (503, 504)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def check(self) -> None:
        """Every error must have the error format, and none may be unexpected."""
        assert self.status < 500 or self.status in ALLOWED_5XX, self
        if self.status < 400:
            return
        assert self.headers.get("content-type", "").startswith("application/json"), self
        if not self.body and self.headers.get("content-length", "0") != "0":
            return  # the response to HEAD
        error = json.loads(self.body)["error"]
        assert set(error) - {"details"} == {"message", "type", "param", "code"}, self
        assert error["message"].strip() and error["type"], self
        assert len(self.body) < 10_000, "an error must not repeat the request"
        assert "Traceback" not in error["message"] and "/work/" not in error["message"], self


class _Stream(io.BytesIO):
    """Looks like a socket to HTTPResponse; several responses are read from it in turn."""

    def makefile(self, *_: object) -> "_Stream":
        return self

    def close(self) -> None:
        pass


def parse(data: bytes, *, method: str = "POST") -> list[Answer]:
    """The responses in `data`; the last one may be incomplete. Raises AssertionError for invalid HTTP."""
    stream, answers = _Stream(data), []
    while stream.tell() < len(data):
        begin = stream.tell()
        response = HTTPResponse(stream, method=method)  # type: ignore[arg-type]
        try:
            response.begin()
            body = response.read()
        except HTTPException as e:
            assert data[begin:].startswith(b"HTTP/1."), f"invalid HTTP: {data[begin : begin + 200]!r}"
            assert isinstance(e, Exception)
            break
        headers = {name.lower(): value for name, value in response.getheaders()}
        answers.append(Answer(response.status, headers, body))
    return answers


def send(
    port: int,
    data: bytes | Iterable[bytes],
    *,
    pause_s: float = 0.0,
    patience_s: float | None = None,
    timeout_s: float = 20.0,
    until_closed: bool = False,
) -> bytes:
    """Sends `data`, piece by piece with pauses, and reads until one response is complete (until_closed: until the end).

    patience_s: how long to wait for a response that need not come. Without it, no response within timeout_s is an AssertionError. The
    server may close the connection while data is still sent.
    """
    pieces = [data] if isinstance(data, bytes) else data
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
        received = bytearray()
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                sock.sendall(piece)
                if pause_s and select.select([sock], [], [], pause_s)[0]:
                    break  # it responds or closes before everything is sent
        deadline = time.monotonic() + (timeout_s if patience_s is None else patience_s)
        while until_closed or not is_whole(bytes(received)):
            sock.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                chunk = sock.recv(65536)
            except ConnectionError:
                break
            except TimeoutError:
                if patience_s is not None:
                    break
                raise AssertionError(f"no answer in {timeout_s:g} s; so far {bytes(received[:200])!r}") from None
            if not chunk:
                break
            received += chunk
        return bytes(received)


def is_whole(data: bytes) -> bool:
    """Whether at least one response is complete."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    lowered = head.lower()
    if b"transfer-encoding: chunked" in lowered:
        return body.endswith(b"0\r\n\r\n")
    for line in lowered.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return False


def request(
    path: str,
    body: bytes = b"",
    *,
    method: str = "POST",
    headers: Sequence[tuple[str, str]] = (),
    key: str | None,
    content_type: str | None = "application/json",
    length: int | None = None,
    version: str = "HTTP/1.1",
) -> bytes:
    """A request's bytes. length: the Content-Length to claim instead of the real one."""
    lines = [f"{method} {path} {version}", "Host: localhost"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    if not any(name.lower() in ("content-length", "transfer-encoding") for name, _ in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body
