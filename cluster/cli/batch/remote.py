"""The batches of a running server, over its public API: upload, create, poll, cancel, download.

Knows the endpoints /v1/files and /v1/batches, and no job. Uploads and batches carry the run's id, by which a later command finds them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cluster.api.schemas.batches import Batch, BatchList, FileList, FileObject
from cluster.batch.errors import NOTHING_LOST, StoreError
from cluster.cli.client import Client
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError

KEEP_S = 30 * 86_400  # how long the server keeps the files of a run; they are fetched long before
UPLOAD_TIMEOUT_S = 600.0  # of silence: the server may still be writing the end of the file to its disk
RUN_KEY = "tramontane_run"


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Replica(msgspec.Struct):
    state: str


class _View(msgspec.Struct):
    replicas: list[_Replica]
    num_desired: int


class RemoteBatches:
    """A server's batches. Close it, or use it in a `with` statement.

    Methods raise ReplicaUnavailableError if a later attempt may succeed, ConfigError for a wrong key or address, and RequestError for what
    the server refuses.
    """

    def __init__(self, url: str, *, api_key: str | None = None, ca_cert: Path | None = None) -> None:
        self._client = Client(url, api_key=api_key, ca_cert=ca_cert)

    def __enter__(self) -> "RemoteBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._client.close()

    def model(self) -> str:
        """The first model that the server serves."""
        return self._client.get("/v1/models", _Models).data[0].id

    def upload(self, source: Path, *, filename: str) -> FileObject:
        """Streams the file from disk. Raises StoreError if it cannot be read."""
        fields = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": str(KEEP_S)}
        try:
            return self._client.upload(
                "/v1/files",
                source,
                FileObject,
                filename=filename,
                content_type="application/jsonl",
                fields=fields,
                timeout_s=UPLOAD_TIMEOUT_S,
            )
        except OSError as e:
            raise StoreError(f"{source} cannot be read: {e.strerror or e}.") from e

    def find_file(self, filename: str) -> FileObject | None:
        """The upload with this name, or None."""
        files = self._pages("/v1/files?purpose=batch&limit=10000", FileList)
        return next((f for f in files if f.filename == filename), None)

    def create(self, *, input_file_id: str, endpoint: str, window: str, metadata: Mapping[str, str]) -> Batch:
        body = {
            "input_file_id": input_file_id,
            "endpoint": endpoint,
            "completion_window": window,
            "metadata": metadata,
            "output_expires_after": {"anchor": "created_at", "seconds": KEEP_S},
        }
        return self._client.post("/v1/batches", body, Batch)

    def find(self, run_id: str) -> Batch | None:
        """The batch of this run, or None."""
        batches = self._pages("/v1/batches?limit=100", BatchList)
        return next((b for b in batches if (b.metadata or {}).get(RUN_KEY) == run_id), None)

    def get(self, batch_id: str) -> Batch:
        return self._client.get(f"/v1/batches/{batch_id}", Batch)

    def cancel(self, batch_id: str) -> Batch:
        return self._client.post(f"/v1/batches/{batch_id}/cancel", {}, Batch)

    def download(self, file_id: str, target: Path) -> None:
        """Writes `target` completely or not at all. Raises StoreError if it cannot be written."""
        try:
            self._client.download(f"/v1/files/{file_id}/content", target)
        except OSError as e:
            raise StoreError(f"{target} cannot be written: {e.strerror or e}.", remedy=NOTHING_LOST) from e

    def replicas(self) -> tuple[int, int] | None:
        """(ready, wanted) replicas; None if this key may not see them."""
        with contextlib.suppress(ConfigError, RequestError, ReplicaUnavailableError):
            view = self._client.get("/admin/cluster", _View)
            return sum(r.state == "ready" for r in view.replicas), view.num_desired
        return None

    def _pages(self, path: str, kind: "type[FileList | BatchList]") -> Iterator[Any]:
        after = ""
        while True:
            page = self._client.get(f"{path}{after}", kind)
            yield from page.data
            if not page.has_more:
                return
            after = f"&after={page.last_id}"
