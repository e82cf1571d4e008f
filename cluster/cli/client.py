"""The HTTP client of all commands: one server's JSON, uploads and downloads, and every failure as one of our exceptions.

Knows addresses, API keys, certificates and proxies; knows no endpoint. It does not retry: a command that waits for a server asks again.
"""

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx
import msgspec

from cluster.config.serve import API_KEY_ENV
from cluster.system.files import move_into_place
from cluster.system.tls import client_context, distrust
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError, TramontaneError

T = TypeVar("T")
TIMEOUT_S = 30.0  # of silence: to connect, and between two pieces of a request or an answer
_TRY_AGAIN = (408, 416, 429)  # and every 5xx; after 416 a download starts over


class Client:
    """A server. Close it, or use it in a `with` statement. `url` may end with /v1, as other clients want it.

    Methods raise ReplicaUnavailableError where a later attempt may succeed, ConfigError for a wrong address, key, certificate or server
    version, and RequestError for what the server refuses. `path` starts with "/" and may have a query.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, ca_cert: Path | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        host = _host_of(url)
        self.authorization: dict[str, str] = {}  # the header that carries the key
        if api_key:
            if not re.fullmatch(r"[!-~]+", api_key):
                raise ConfigError(
                    "The API key contains spaces or non-ASCII characters.",
                    remedy=f"Check --api-key and {API_KEY_ENV}.",
                    param="--api-key",
                )
            self.authorization["Authorization"] = f"Bearer {api_key}"
        try:
            self._http = httpx.Client(
                headers=self.authorization,
                verify=client_context(ca_cert),
                timeout=timeout_s,
                follow_redirects=True,
                # HTTP_PROXY and NO_PROXY apply, except to this machine: a proxy would look for the server on its own.
                trust_env=not (_is_this_machine(host) or _is_in_no_proxy_network(host)),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as e:
            raise ConfigError(
                f"The proxy that the environment names cannot be used: {str(e).rstrip('.')}.",
                remedy="Correct HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (http:// or https://), or add the server's host to NO_PROXY.",
            ) from e
        self._etags: dict[Path, str] = {}  # of downloads that broke off, by target

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._http.close()

    def get(self, path: str, kind: type[T]) -> T:
        """The answer's JSON as `kind`."""
        return self._decoded(self._read("GET", path), kind)

    def post(self, path: str, body: object, kind: type[T]) -> T:
        """Sends `body` as JSON; the answer's JSON as `kind`."""
        return self._decoded(self._read("POST", path, json=body), kind)

    def post_text(self, path: str, body: object) -> str:
        """Sends `body` as JSON; the answer as text."""
        return self._read("POST", path, json=body).decode()

    def upload(
        self,
        path: str,
        source: Path,
        kind: type[T],
        *,
        filename: str,
        content_type: str,
        fields: Mapping[str, str],
        timeout_s: float = TIMEOUT_S,
    ) -> T:
        """Sends the file as the form's field `file`, streamed from the disk. Raises OSError where it cannot be read."""
        with source.open("rb") as file:
            data = self._read(
                "POST", path, data=dict(fields), files={"file": (filename, file, content_type)}, timeout=timeout_s
            )
        return self._decoded(data, kind)

    def download(self, path: str, target: Path) -> None:
        """Writes `target.part` and renames it when it is complete. Raises OSError where it cannot be written.

        After an interruption, the next call of this client for the same target asks for the missing bytes only. If the server's file is
        another one by then, which its ETag shows, the download starts over.
        """
        partial = target.with_name(f"{target.name}.part")
        etag = self._etags.pop(target, None)
        start = partial.stat().st_size if etag is not None and partial.exists() else 0
        headers = {"Accept-Encoding": "identity"}
        if start and etag is not None:
            # Servers may ignore an If-Range that is an ETag, and aiohttp's do, so the answer's own ETag is compared below.
            headers |= {"Range": f"bytes={start}-", "If-Range": etag}
        with self._open("GET", path, headers=headers) as answer:
            is_rest = answer.status_code == httpx.codes.PARTIAL_CONTENT
            found = answer.headers.get("ETag")
            is_another = is_rest and (found != etag or not _starts_at(answer, start))
            if not is_another:
                with partial.open("ab" if is_rest else "wb") as file:
                    if found is not None:
                        self._etags[target] = found
                    for chunk in answer.iter_raw():
                        file.write(chunk)
        if is_another:
            self.download(path, target)
            return
        move_into_place(partial, target)
        self._etags.pop(target, None)

    def _read(self, method: str, path: str, **request: Any) -> bytes:
        with self._open(method, path, **request) as answer:
            return answer.read()

    @contextlib.contextmanager
    def _open(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """A successful answer whose body is still to be read."""
        try:
            with self._http.stream(method, self.url + path, **request) as answer:
                if not answer.is_success:
                    answer.read()
                    raise self._refusal(answer, path)
                yield answer
        except (httpx.TransportError, httpx.DecodingError, httpx.TooManyRedirects) as e:
            self._raise_unavailable(e)

    def _raise_unavailable(self, error: httpx.RequestError) -> NoReturn:
        cause = _cause_of(error)
        if distrusted := distrust(self.url, cause):
            raise distrusted from error
        if isinstance(error, httpx.ReadError | httpx.WriteError | httpx.ProtocolError | httpx.DecodingError):
            raise ReplicaUnavailableError(f"The server at {self.url} broke off the connection ({error}).") from error
        reason = getattr(cause, "strerror", None) or str(error) or type(error).__name__
        raise ReplicaUnavailableError(
            f"Nothing answers at {self.url} ({reason}).",
            remedy="Start `tramontane serve` there, or give another address with --url.",
        ) from error

    def _refusal(self, answer: httpx.Response, path: str) -> TramontaneError:
        """The exception for an answer that is not a success: in the server's words where it has any."""
        status, error = answer.status_code, _error_of(answer.content)
        message = f"The server at {self.url} answered {status} {answer.reason_phrase}.".replace(" .", ".")
        if status in (401, 403):
            sent = "Authorization" in self._http.headers
            refused = f"The server at {self.url} {'refused the' if sent else 'requires an'} API key."
            return ConfigError(
                str(error.get("message") or refused),
                remedy=f"Give a key that may do this with --api-key or {API_KEY_ENV}.",
                param="--api-key",
            )
        if status == 404 and (not error or error.get("code") == "unknown_url"):
            return ConfigError(
                f"The server at {self.url} has no {path.partition('?')[0]}.",
                remedy="Give the address of a Tramontane server of this version with --url, without a path.",
                param="--url",
            )
        if status in _TRY_AGAIN or status >= 500:
            return ReplicaUnavailableError(str(error.get("message") or message))
        return RequestError(str(error.get("message") or message), param=error.get("param"), code=error.get("code"))

    def _decoded(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError as e:
            raise ConfigError(
                f"Incompatible server version at {self.url}: {e}.",
                remedy="Use the `tramontane` that the server was started with.",
                param="--url",
            ) from e


def _host_of(url: str) -> str:
    """Raises ConfigError for what is not an http or https URL."""
    with contextlib.suppress(httpx.InvalidURL):
        parts = httpx.URL(url)
        if parts.host and parts.scheme in ("http", "https") and 0 < (parts.port or 80) < 65_536:
            return parts.host
    raise ConfigError(
        f"--url {url} is not the address of a server.", remedy="Write it like http://127.0.0.1:8000.", param="--url"
    )


def _error_of(data: bytes) -> dict[str, Any]:
    """The `error` of an answer in OpenAI's form, which has `message`, `param` and `code`; empty for any other answer."""
    with contextlib.suppress(msgspec.DecodeError, TypeError, KeyError):
        error = msgspec.json.decode(data)["error"]
        if isinstance(error, dict):
            return error
    return {}


def _cause_of(error: BaseException) -> BaseException:
    """What the operating system or OpenSSL raised, beneath the layers of the HTTP library."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _is_this_machine(host: str) -> bool:
    """Without asking the name service: behind a proxy only the proxy may know the name."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        name = host.lower().rstrip(".")
        return name == "localhost" or name.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _is_in_no_proxy_network(host: str) -> bool:
    """Networks such as 10.0.0.0/8 in NO_PROXY, which the HTTP library does not know; it does know names and addresses."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    for entry in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(","):
        with contextlib.suppress(ValueError):
            if "/" in entry and address in ipaddress.ip_network(entry.strip(), strict=False):
                return True
    return False


def _starts_at(answer: httpx.Response, start: int) -> bool:
    return str(answer.headers.get("Content-Range", "")).startswith(f"bytes {start}-")
