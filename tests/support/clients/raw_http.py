"""Bytes to a socket and whatever comes back, read as HTTP answers without believing that they are. No client library in between."""

import contextlib
import io
import json
import select
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse

# What a server may say that has refused nothing of ours: it is busy, or the deadline that we asked for is over.
ALLOWED_5XX = (503, 504)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def check(self) -> None:
        """An error is an envelope; nothing is a surprise."""
        assert self.status < 500 or self.status in ALLOWED_5XX, self
        if self.status < 400:
            return
        assert self.headers.get("content-type", "").startswith("application/json"), self
        if not self.body and self.headers.get("content-length", "0") != "0":
            return  # the answer to HEAD
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, self
        assert error["message"].strip() and error["type"], self
        assert len(self.body) < 10_000, "an error is no echo of what was sent"
        assert "Traceback" not in error["message"] and "/work/" not in error["message"], self


class _Stream(io.BytesIO):
    """What HTTPResponse takes for a socket; several answers are read from it in turn."""

    def makefile(self, *_: object) -> "_Stream":
        return self

    def close(self) -> None:
        pass


def parse(data: bytes, *, method: str = "POST") -> list[Answer]:
    """The answers in `data`, the last of which may be cut off. What is no HTTP raises AssertionError."""
    stream, answers = _Stream(data), []
    while stream.tell() < len(data):
        begin = stream.tell()
        response = HTTPResponse(stream, method=method)  # type: ignore[arg-type]
        try:
            response.begin()
            body = response.read()
        except HTTPException as e:
            assert data[begin:].startswith(b"HTTP/1."), f"no HTTP: {data[begin : begin + 200]!r}"
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
    """Sends `data`, piece by piece with pauses, and reads until one whole answer is there (or the end, until_closed).

    patience_s: for what may deserve no answer, how long to wait for one. Without it, no answer in timeout_s is an AssertionError; a
    server that closes while we still send is none.
    """
    pieces = [data] if isinstance(data, bytes) else data
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
        received = bytearray()
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                sock.sendall(piece)
                if pause_s and select.select([sock], [], [], pause_s)[0]:
                    break  # it answers, or closes, before we are done
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
    """Whether at least one answer has arrived to its end."""
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
    """A request's bytes. length: what it claims, instead of the truth."""
    lines = [f"{method} {path} {version}", "Host: localhost"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    if not any(name.lower() in ("content-length", "transfer-encoding") for name, _ in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body
