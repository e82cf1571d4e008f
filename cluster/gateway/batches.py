"""What one gateway needs to take batches and to run them, opened and ended with it: the data directory, the store, the service.

Knows what the pieces are and how they hang together; no HTTP and no Ray. Several gateways share the store: each batch is run by one
of them at a time, and each tells the router, for whoever scales, of those that it runs.
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path

from cluster.api.context import Batches
from cluster.batch.errors import StoreError
from cluster.batch.files import FileContents
from cluster.batch.records import MAX_REPLICAS_KEY, BatchRecord
from cluster.batch.run.executor import LineExecutor
from cluster.batch.run.service import BatchService
from cluster.batch.store.interface import Store
from cluster.batch.store.open import open_files, open_store
from cluster.config.serve import ServeConfig
from cluster.protocol.report import BatchDemand
from cluster.router.router import Router
from cluster.system.data_dir import DataDir, default_data_dir
from cluster.system.net import is_loopback
from workers.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class Batching:
    """`api` is for the application, whose parts then make the executor for `start`. At last `close`."""

    def __init__(self, data_dir: DataDir, store: Store, files: FileContents, router: Router) -> None:
        self.api = Batches(store=store, files=files, wake=self._wake)
        self.running: tuple[BatchRecord, ...] = ()  # of all gateways, as of a moment ago
        self._data_dir = data_dir
        self._store = store
        self._files = files
        self._router = router
        self._service: BatchService | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, executor: LineExecutor) -> list[asyncio.Task[None]]:
        """Runs what the store holds from now on. The tasks end only when something is wrong."""
        service = self._service = BatchService(self._store, self._files, executor)
        self._tasks = [
            asyncio.create_task(service.run(), name="batches"),
            asyncio.create_task(self._watch(service), name="watch over batches"),
        ]
        return self._tasks

    async def stop(self) -> None:
        """Lets go of every line under way; whoever runs the batch next does it again. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._router.batches = ()

    async def close(self) -> None:
        """Idempotent."""
        await self.stop()
        with contextlib.suppress(StoreError):
            await self._store.close()
        self._data_dir.close()

    def _wake(self) -> None:
        if self._service is not None:
            self._service.wake()

    async def _watch(self, service: BatchService) -> None:
        while True:
            try:
                self.running = tuple(await self._store.running_batches())
            except StoreError as e:
                log.debug("What batches there are cannot be seen now: %s", e)
            now, here = time.time(), service.batch_ids
            self._router.batches = tuple(
                BatchDemand(
                    batch_id=batch.id,
                    remaining_tokens=batch.remaining_tokens,
                    deadline_s=max(0.0, batch.expires_at - now),
                    max_replicas=_max_replicas(batch),
                )
                for batch in self.running
                if batch.id in here and batch.remaining_tokens
            )
            await asyncio.sleep(LOOK_EVERY_S)


def _max_replicas(batch: BatchRecord) -> int | None:
    """What `tramontane batch run --max-replicas` wrote into the batch's metadata; None for anything else."""
    text = (batch.metadata or {}).get(MAX_REPLICAS_KEY, "")
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 6 else None


def open_batching(config: ServeConfig, router: Router) -> Batching | str:
    """The reason in a sentence for clients where there can be no batches. Raises ConfigError for what was asked for and cannot be."""
    if not config.serves_batches:
        return "This server was started without batches (--no-batches)."
    try:
        if (
            config.num_gateways > 1
            and config.ray_address
            and config.batch_store is None
            and not is_loopback(config.host)
        ):
            raise ConfigError(
                "Gateways on several hosts need one store for their batches: add --batch-store URL and a --data-dir that all of them "
                "share, or --no-batches."
            )
        path = default_data_dir(config.deployment) if config.data_dir is None else Path(config.data_dir)
        data_dir = DataDir(path, model_name=config.model_name)
        try:
            return Batching(data_dir, open_store(path, database_url=config.batch_store), open_files(path), router)
        except BaseException:
            data_dir.close()
            raise
    except (ConfigError, StoreError) as e:
        if config.data_dir is not None or config.batch_store is not None:
            raise ConfigError(str(e)) from e
        # Whoever never thinks of batches shall not be kept from serving by their store.
        log.warning("This server takes no batches: %s", e)
        return "This server cannot take batches; its log says why."
