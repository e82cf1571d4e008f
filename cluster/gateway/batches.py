"""What one gateway needs to accept and run batches, opened and closed with it: the data directory, the store, the service.

Knows how the pieces fit together; no HTTP and no Ray. Several gateways share the store: one of them at a time runs a batch, and reports it
to the autoscaler through its router.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.api.context import NO_BATCHES, Batches
from cluster.api.server.errors import HTTPError
from cluster.api.stored.service import Executor, ResponseService
from cluster.batch.errors import StoreError
from cluster.batch.files import FileContents
from cluster.batch.records import MAX_REPLICAS_KEY, BatchRecord
from cluster.batch.run.executor import LineExecutor
from cluster.batch.run.service import BatchService
from cluster.batch.store.interface import Store
from cluster.batch.store.open import open_files, open_store
from cluster.config.serve import ServeConfig
from cluster.protocol.names import server_of
from cluster.protocol.report import BatchDemand
from cluster.responses.counts import ResponseCounts
from cluster.router.router import Router
from cluster.system.data_dir import DataDir, default_data_dir
from cluster.system.net import is_loopback
from workers.errors import ConfigError

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0


class GatewayBatches:
    """Give `api` to the application, then call `start` with an executor made from the application, and `close` at the end.

    `share`: told every second about the batches that run here, each with the model that its lines name, None for several.
    """

    def __init__(self, data_dir: DataDir, store: Store, files: FileContents, router: Router) -> None:
        self._responses = ResponseService(store.responses)
        self.api = Batches(store=store, files=files, wake=self._wake, responses=self._responses)
        self.running: tuple[BatchRecord, ...] = ()  # of all gateways, up to a second old
        self._data_dir = data_dir
        self._store = store
        self._files = files
        self._router = router
        self.share: Callable[[Sequence[tuple[str | None, BatchDemand]]], None] = self._all_here
        self._service: BatchService | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def response_counts(self) -> ResponseCounts:
        """Of the stored responses at this gateway, for its metrics."""
        return self._responses.counts

    def start(self, executor: LineExecutor, responses: Executor | None = None) -> list[asyncio.Task[None]]:
        """Starts to run the batches in the store, and its responses with their own executor. The tasks end only on an error."""
        service = self._service = BatchService(self._store, self._files, executor)
        self._tasks = [
            asyncio.create_task(service.run(), name="batches"),
            asyncio.create_task(self._poll(service), name="batch poll"),
        ]
        return self._tasks + ([] if responses is None else self._responses.start(responses))

    async def adapters_of_responses(self) -> set[str]:
        """The revisions that stored responses which have not ended name, at any gateway. Raises StoreError."""
        return await self._store.responses.adapters()

    async def stop(self) -> None:
        """Abandons every line in progress; the next runner of the batch repeats it. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.share([])

    async def leave_responses(self) -> None:
        """Leaves those that nobody here waits for to other gateways, and takes no more."""
        await self._responses.leave()

    async def stop_responses(self) -> None:
        """Leaves the responses that still run to other gateways, or to the next start. Idempotent."""
        await self._responses.stop(
            HTTPError(
                503,
                "The server is shutting down. The response continues on another one, or after a restart.",
                remedy="Retrieve it by its id.",
                code="server_leaving",
            )
        )

    async def close(self) -> None:
        """Idempotent."""
        await self.stop()
        await self.stop_responses()
        with contextlib.suppress(StoreError):
            await self._store.close()
        self._data_dir.close()

    def _all_here(self, running: Sequence[tuple[str | None, BatchDemand]]) -> None:
        """For a server with one model."""
        self._router.batches = tuple(demand for _, demand in running)

    def _wake(self) -> None:
        if self._service is not None:
            self._service.wake()

    async def _poll(self, service: BatchService) -> None:
        while True:
            try:
                self.running = tuple(await self._store.running_batches())
            except StoreError as e:
                log.debug("The running batches cannot be read now: %s", e)
            now, here = time.time(), service.batch_ids
            self.share(
                [
                    (
                        batch.model,
                        BatchDemand(
                            batch_id=batch.id,
                            remaining_tokens=batch.remaining_tokens,
                            deadline_s=max(0.0, batch.expires_at - now),
                            max_replicas=_max_replicas(batch),
                        ),
                    )
                    for batch in self.running
                    if batch.id in here and batch.remaining_tokens
                ]
            )
            await asyncio.sleep(POLL_INTERVAL_S)


def _max_replicas(batch: BatchRecord) -> int | None:
    """The value that `tramontane batch run --max-replicas` wrote into the batch's metadata; None for anything else."""
    text = (batch.metadata or {}).get(MAX_REPLICAS_KEY, "")
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 6 else None


def open_batches(config: ServeConfig, router: Router, *, claim: str | None = None) -> GatewayBatches | str:
    """The batches of this gateway, or one sentence for clients on why there are none.

    claim: the models that the data directory is for; None for the configuration's.
    Raises ConfigError if a data directory or a store was asked for explicitly and cannot be used.
    """
    if not config.serves_batches:
        return NO_BATCHES
    try:
        if (
            config.num_gateways > 1
            and config.ray_address
            and config.batch_store is None
            and not is_loopback(config.host)
        ):
            raise ConfigError(
                "Gateways on several hosts need one shared store for their batches.",
                remedy="Add --batch-store URL and a --data-dir that all of them share, or add --no-batches.",
                param="--batch-store",
            )
        path = default_data_dir(server_of(config.deployment)) if config.data_dir is None else Path(config.data_dir)
        data_dir = DataDir(path, model_name=claim or config.model_name)
        try:
            return GatewayBatches(data_dir, open_store(path, database_url=config.batch_store), open_files(path), router)
        except BaseException:
            data_dir.close()
            raise
    except (ConfigError, StoreError) as e:
        if config.data_dir is not None or config.batch_store is not None:
            raise ConfigError(str(e)) from e
        # A server without an explicit store must start even if the default store cannot be used.
        log.warning("This server accepts no batches: %s", e)
        return "This server cannot accept batches; its log says why."
