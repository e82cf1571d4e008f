"""A batch on a running server, over HTTP: upload, create, wait, download. Knows /v1/files and /v1/batches, and no Ray.

The server is asked as any client would: by the official paths, with the key. It may go away and come back at any moment; a wait outlasts
that. What was uploaded and created carries the run's id, so that a command that died between two steps finds it and does nothing twice.
"""

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cluster.api.schemas.batches import Batch, BatchList, FileList, FileObject
from cluster.batch.errors import StoreError
from cluster.batch.job import Job, JobFolder, Outcome
from cluster.batch.progress import Display, Snapshot
from cluster.batch.records import ENDED, MAX_REPLICAS_KEY, LineError
from cluster.batch.steps import Lines, conclude, endpoint_of, refused
from cluster.tls import client_context, distrust
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError

T = TypeVar("T")
DEFAULT_WINDOW = "24h"
KEEP_S = 30 * 86_400  # what the server keeps of a run; by then it has long been fetched
TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 600.0  # of silence; the server may still be writing the last of it to its disk
LOOK_EVERY_S = 1.0
RETRY_S = 2.0
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


def run_there(folder: JobFolder, job: Job, remote: RemoteBatches, display: Display) -> Job:
    """Brings the job to its end, from wherever it is; the caller holds the folder. Ctrl-C ends the waiting, and not the batch.

    Raises TramontaneError with a sentence for the user. Before the batch exists a server that does not answer is an error, later a pause.
    """
    if job.batch_id is None:
        job = _begin(folder, job, remote)
    assert job.batch_id is not None
    batch = _wait(remote, job.batch_id, display)
    if batch.status == "failed":
        folder.clear(keep_job=False)  # so that the same command can be given again with the file in order
        errors = batch.errors.data if batch.errors is not None else []
        raise refused(
            job.source, [LineError(code=e.code, message=e.message, line=e.line, param=e.param) for e in errors]
        )
    output = _fetch(folder, remote, batch.output_file_id, "output", display)
    error_file = _fetch(folder, remote, batch.error_file_id, "errors", display)
    outcome = Outcome(
        status=batch.status,
        num_lines=batch.request_counts.total,
        num_completed=batch.request_counts.completed,
        num_failed=batch.request_counts.failed,
        num_prompt_tokens=batch.usage.input_tokens,
        num_output_tokens=batch.usage.output_tokens,
    )
    return conclude(folder, job, outcome, output=output, errors=error_file)


def snapshot_of(batch: Batch, replicas: tuple[int, int] | None) -> Snapshot:
    """For a display."""
    return Snapshot(
        status=batch.status,
        num_lines=batch.request_counts.total,
        num_completed=batch.request_counts.completed,
        num_failed=batch.request_counts.failed,
        num_tokens=batch.usage.total_tokens,
        replicas=replicas,
    )


def _begin(folder: JobFolder, job: Job, remote: RemoteBatches) -> Job:
    """Makes the batch, or finds what an earlier command made of it."""
    staged, filename = folder.path / "input.jsonl", f"tramontane-{job.run_id}.jsonl"
    if not staged.exists():
        try:
            _stage(job, staged, model=job.request["model"] or remote.model())
        except (RequestError, ConfigError):  # nothing has begun: the same command can be given again, put right
            folder.clear(keep_job=False)
            raise
    if job.input_file_id is None:
        file = remote.find_file(filename) or remote.upload(staged, filename=filename)
        job = msgspec.structs.replace(job, input_file_id=file.id)
        folder.write(job)
    assert job.input_file_id is not None
    batch = remote.find(job.run_id)
    if batch is None:
        metadata = {RUN_KEY: job.run_id}
        if (most := job.options.get("max_replicas")) is not None:
            metadata[MAX_REPLICAS_KEY] = str(most)
        window = job.options.get("deadline") or DEFAULT_WINDOW
        batch = remote.create(
            input_file_id=job.input_file_id, endpoint=endpoint_of(staged), window=window, metadata=metadata
        )
    job = msgspec.structs.replace(job, batch_id=batch.id)
    folder.write(job)
    with contextlib.suppress(OSError):
        staged.unlink(missing_ok=True)
    return job


def _stage(job: Job, target: Path, *, model: str) -> None:
    temporary = target.with_name(f"{target.name}.part")
    try:
        with temporary.open("wb") as file:
            for chunk in Lines(job, model=model):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as e:
        raise StoreError(f"{temporary} cannot be written: {e.strerror}. Nothing has begun.") from e


def _wait(remote: RemoteBatches, batch_id: str, display: Display) -> Batch:
    while True:
        try:
            batch = remote.get(batch_id)
        except ReplicaUnavailableError as e:
            display.trouble(f"{e} Asking on; the batch is safe there.")
            time.sleep(RETRY_S)
            continue
        if batch.status in ENDED:
            return batch
        display.show(snapshot_of(batch, remote.replicas()))
        time.sleep(LOOK_EVERY_S)


def _fetch(folder: JobFolder, remote: RemoteBatches, file_id: str | None, name: str, display: Display) -> Path | None:
    if file_id is None:
        return None
    target = folder.path / f"{name}.jsonl"
    while True:
        try:
            remote.download(file_id, target)
        except ReplicaUnavailableError as e:
            display.trouble(f"{e} Asking on; the batch is safe there.")
            time.sleep(RETRY_S)
        else:
            return target


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
