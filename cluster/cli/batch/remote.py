"""A running server's batches, over HTTP: upload, create, look, cancel, download. Knows /v1/files and /v1/batches, and no job.

The server is asked as any client would: by the official paths, with the key. What was uploaded and created carries the run's id, by which
it is found again.
"""

import contextlib
import json
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cluster.api.schemas.batches import Batch, BatchList, FileList, FileObject
from cluster.batch.errors import StoreError
from cluster.system.tls import client_context, distrust
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError

T = TypeVar("T")
KEEP_S = 30 * 86_400  # what the server keeps of a run; by then it has long been fetched
TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 600.0  # of silence; the server may still be writing the last of it to its disk
PIECE_BYTES = 1024 * 1024
RUN_KEY = "tramontane_run"


class RemoteBatches:
    """A server's batches. Methods raise ReplicaUnavailableError where it may help to ask again later, ConfigError for a wrong key or
    address, RequestError for what the server refuses.
    """

    def __init__(self, url: str, *, api_key: str | None = None, ca_cert: Path | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url} is not the address of a server; write it like http://127.0.0.1:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._context = client_context(ca_cert)

    def model(self) -> str:
        """The first that the server serves."""
        return json.loads(self._ask("/v1/models"))["data"][0]["id"]

    def upload(self, source: Path, *, filename: str) -> FileObject:
        """Streams it from the disk."""
        boundary = uuid.uuid4().hex
        fields = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": str(KEEP_S)}
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        )
        head += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        head += "Content-Type: application/jsonl\r\n\r\n"
        tail = f"\r\n--{boundary}--\r\n"
        size = len(head) + source.stat().st_size + len(tail)
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": str(size)}
        body = _pieces(head.encode(), source, tail.encode())
        return _decode(self._ask("/v1/files", body, headers, timeout_s=UPLOAD_TIMEOUT_S), FileObject)

    def find_file(self, filename: str) -> FileObject | None:
        """An upload of this name."""
        return next(
            (f for f in self._pages("/v1/files?purpose=batch&limit=10000", FileList) if f.filename == filename), None
        )

    def create(self, *, input_file_id: str, endpoint: str, window: str, metadata: Mapping[str, str]) -> Batch:
        body = {
            "input_file_id": input_file_id,
            "endpoint": endpoint,
            "completion_window": window,
            "metadata": metadata,
            "output_expires_after": {"anchor": "created_at", "seconds": KEEP_S},
        }
        return _decode(self._ask("/v1/batches", json.dumps(body).encode()), Batch)

    def find(self, run_id: str) -> Batch | None:
        """The batch of this run."""
        batches = self._pages("/v1/batches?limit=100", BatchList)
        return next((b for b in batches if (b.metadata or {}).get(RUN_KEY) == run_id), None)

    def get(self, batch_id: str) -> Batch:
        return _decode(self._ask(f"/v1/batches/{batch_id}"), Batch)

    def cancel(self, batch_id: str) -> Batch:
        return _decode(self._ask(f"/v1/batches/{batch_id}/cancel", b"{}"), Batch)

    def download(self, file_id: str, target: Path) -> None:
        """The whole file, or nothing at `target`. Raises StoreError where it cannot be written."""
        temporary = target.with_name(f"{target.name}.part")
        with self._open(f"/v1/files/{file_id}/content") as answer:
            wanted = answer.headers.get("Content-Length")
            try:
                file = temporary.open("wb")
            except OSError as e:
                raise StoreError(f"{temporary} cannot be written: {e.strerror}. Nothing is lost.") from e
            with file:
                while piece := answer.read(PIECE_BYTES):
                    try:
                        file.write(piece)
                    except OSError as e:
                        raise StoreError(f"{temporary} cannot be written: {e.strerror}. Nothing is lost.") from e
                if wanted is not None and file.tell() != int(wanted):
                    raise ReplicaUnavailableError(f"The server at {self.url} broke off in the middle of a file.")
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)

    def replicas(self) -> tuple[int, int] | None:
        """Those ready and those wanted; None for whose key may not know."""
        with contextlib.suppress(ConfigError, RequestError, ReplicaUnavailableError, KeyError, ValueError):
            view = json.loads(self._ask("/admin/cluster"))
            return sum(r["state"] == "ready" for r in view["replicas"]), view["num_desired"]
        return None

    def _pages(self, path: str, kind: "type[FileList | BatchList]") -> Iterator[Any]:
        after = ""
        while True:
            page = _decode(self._ask(f"{path}{after}"), kind)
            yield from page.data
            if not page.has_more:
                return
            after = f"&after={page.last_id}"

    def _ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> bytes:
        with self._open(path, body, headers, timeout_s=timeout_s) as answer:
            return answer.read()

    @contextlib.contextmanager
    def _open(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> Iterator[Any]:
        request = urllib.request.Request(self.url + path, data=body, headers=dict(headers or {}))
        if body is not None and headers is None:
            request.add_header("Content-Type", "application/json")
        if self._api_key:
            request.add_header("Authorization", f"Bearer {self._api_key}")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s, context=self._context) as answer:
                yield answer
        except urllib.error.HTTPError as e:
            raise self._refusal(path, e) from e
        except (OSError, ValueError, EOFError) as e:
            if distrusted := distrust(self.url, e):
                raise distrusted from e
            raise ReplicaUnavailableError(
                f"Nothing answers at {self.url} ({getattr(e, 'reason', None) or e}); is the server running there?"
            ) from e
        except Exception as e:
            if type(e).__module__ != "http.client":  # a connection cut in mid-answer, of whatever kind
                raise
            raise ReplicaUnavailableError(f"The server at {self.url} broke off: {e!r}.") from e

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> Exception:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError, OSError):
            message = f"The server at {self.url} answered {error.code} {error.reason}."
        if error.code in (401, 403):
            return ConfigError(f"{message} Give the server's key with --api-key or TRAMONTANE_API_KEY.")
        if error.code in (408, 429) or error.code >= 500:
            return ReplicaUnavailableError(message)
        if error.code == 404 and path.startswith("/v1/files?"):
            return ConfigError(
                f"The server at {self.url} has no /v1/files; --url must name a Tramontane of this version."
            )
        return RequestError(message)


def _pieces(head: bytes, source: Path, tail: bytes) -> Iterator[bytes]:
    yield head
    with source.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
    yield tail


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as e:
        raise ConfigError(
            f"What answers there is no Tramontane of this version ({e}); use the `tramontane` it was started with."
        ) from e
