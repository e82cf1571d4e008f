"""One gateway: opens the router, fleet, HTTP application, batches and listener, and closes them in reverse order.

Knows the parts of a gateway; no Ray (the controller is passed in) and no console. `serve` runs one in its own process, actor.py runs
additional ones.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.adapters.served import ServedAdapters
from cluster.api.app import make_app
from cluster.api.context import CONTEXT, NO_BATCHES
from cluster.api.line_executor import ApiLineExecutor
from cluster.api.server.listener import Listener
from cluster.api.stored.executor import ApiExecutor
from cluster.config.serve import ServeConfig
from cluster.gateway.adapters import GatewayAdapters
from cluster.gateway.batches import GatewayBatches, open_batches
from cluster.gateway.fleet import Fleet
from cluster.gateway.preemption import ENDS_AHEAD_S, PreemptionShutdown, notice_for, unfinished_error
from cluster.keys.accounts import Accounts
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger, ledger_path
from cluster.metrics.gateway import Metrics
from cluster.protocol.adapters import AdapterChange, AdapterRevision, Registry
from cluster.protocol.view import ClusterView, without_secrets
from cluster.router.router import Router
from cluster.system.tls import open_certificate
from workers.errors import ConfigError, EngineError, ReplicaUnavailableError

if TYPE_CHECKING:
    from cluster.controller.client import ControllerClient
    from cluster.text.load import LoadedText

log = logging.getLogger(__name__)

SHUTTING_DOWN = "The server is shutting down."
ERROR_TIMEOUT_S = 1.0  # for ended streams to send their error


class Gateway:
    """`await Gateway(...).open()`, then `drain` and `close`. on_view: called with every view of the cluster. links: as in
    `make_app`.

    Raises ConfigError if a file of keys or certificates is missing or invalid, or if a data directory or store of batches was asked for
    and cannot be used.
    """

    def __init__(
        self,
        config: ServeConfig,
        controller: "ControllerClient",
        *,
        text: "LoadedText",
        on_view: Callable[[ClusterView], None] = lambda _: None,
        links: Mapping[str, str] | None = None,
    ) -> None:
        self.gateway_id = f"g-{secrets.token_hex(3)}"
        self.url = ""
        self._config = config
        self._controller = controller
        self.router = Router(
            policy=config.routing_policy,
            max_queued_tokens=config.max_queued_tokens,
            queue_timeout_s=config.queue_timeout_s,
        )
        keys = None if config.api_keys is None else Path(config.api_keys)
        keyring = Keyring(keys, api_key=config.api_key)
        self._ledger = None if keys is None else Ledger(ledger_path(keys))
        self._certificate = open_certificate(config.tls_cert, config.tls_key)
        accounts = Accounts(num_gateways=config.num_gateways)
        opened = open_batches(config, self.router)
        batches = self._batches = opened if isinstance(opened, GatewayBatches) else None
        self.metrics = Metrics(
            self.router,
            model_name=config.model_name,
            prefix=config.metrics_prefix,
            view=lambda: self.view,
            batches=None if batches is None else lambda: batches.running,
        )
        served = self._served = ServedAdapters(on_gone=self.metrics.forget_adapters)
        self.adapters = GatewayAdapters(config, controller, served)
        if self._certificate is not None:
            certificate = self._certificate
            self.metrics.watch_certificate(lambda: certificate.expires_at)
        app = make_app(
            router=self.router,
            tokenizer=text.tokenizer,
            chat_template=text.chat_template,
            model_name=config.model_name,
            keyring=keyring,
            accounts=accounts,
            ledger=self._ledger,
            cors_origins=config.cors_origins,
            local_only=config.is_local,
            sampling_defaults=config.sampling_defaults,
            serves_embeddings=config.serves_embeddings,
            strict=config.strict,
            public_health=config.public_health,
            links=links,
            platform=config.platform,
            metrics=self.metrics,
            admin=self,
            batches=None if batches is None else batches.api,
            no_batches=opened if isinstance(opened, str) else NO_BATCHES,
            adapters=served,
        )
        self._executor = ApiLineExecutor(app[CONTEXT], keyring=keyring, accounts=accounts, ledger=self._ledger)
        self._responses = ApiExecutor(app[CONTEXT], keyring=keyring, accounts=accounts, ledger=self._ledger)
        self._listener = Listener(app, tls=None if self._certificate is None else self._certificate.context)
        self._preemption = PreemptionShutdown(self.router, lambda: self.view, self.gateway_id)
        self._on_view = on_view
        self._fleet: Fleet | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def view(self) -> ClusterView | None:
        """The newest view of the cluster."""
        return None if self._fleet is None else self._fleet.view

    async def open(self) -> "Gateway":
        """Starts to listen and to sync. Raises ConfigError if the port is in use."""
        config = self._config
        try:
            await self._listener.open(config.host, config.port, shared=config.num_gateways > 1)
        except OSError as e:
            raise ConfigError(
                f"Port {config.port} on {config.host} cannot be opened: {e.strerror}.",
                remedy="Choose another with --port.",
                param="--port",
            ) from e
        self.url = config.url(self._listener.port)
        self._fleet = Fleet(
            self._controller,
            self.router,
            gateway_id=self.gateway_id,
            url=self.url,
            on_view=self._handle_view,
            adapter_streams=self._served.streams,
        )
        self._tasks = [
            asyncio.create_task(self._fleet.run(), name="fleet"),
            asyncio.create_task(self._preemption.run(), name="preemption"),
        ]
        if self._batches is not None:
            self._tasks += self._batches.start(self._executor, self._responses)
        if self._ledger is not None:
            self.spawn(asyncio.create_task(self._ledger.run(), name="usage ledger"))
        if self._certificate is not None:
            self.spawn(asyncio.create_task(self._certificate.run(), name="TLS certificate"))
        return self

    def spawn(self, task: asyncio.Task[None]) -> None:
        """Adds a task that ends with this gateway."""
        self._tasks.append(task)

    async def work(self) -> None:
        """Never returns. Raises EngineError when a task that the gateway depends on has ended."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        names = ", ".join(task.get_name() for task in done)
        raise EngineError(f"The gateway failed: its task {names} ended.") from next(iter(done)).exception()

    async def drain(self, timeout_s: float, stop_now: asyncio.Event | None = None) -> None:
        """Refuses new requests and waits for running ones, at most `timeout_s` or until `stop_now`; then ends them with an error.

        Does not wait for batch lines.
        """
        self._preemption.stop()  # it would open or close the router on its own
        if self._batches is not None:
            await self._batches.stop()
            await self._batches.leave_responses()
        self.router.close(SHUTTING_DOWN)
        await self._listener.stop_accepting()
        stopped = stop_now or asyncio.Event()
        await self._until_empty(min(timeout_s, self._left_s()), stopped)
        if self._batches is not None:
            await self._batches.stop_responses()
        if self.router.end_streams(unfinished_error(SHUTTING_DOWN)):
            await self._until_empty(ERROR_TIMEOUT_S, asyncio.Event())

    def _left_s(self) -> float:
        """Seconds until this node is preempted, less the time to end requests; infinite without a notice."""
        notice = None if self.view is None else notice_for(self.view, self.gateway_id, time.time())
        return math.inf if notice is None else max(0.0, notice.deadline - ENDS_AHEAD_S - time.time())

    async def _until_empty(self, timeout_s: float, stopped: asyncio.Event) -> None:
        deadline = time.monotonic() + timeout_s
        while self.router.num_inflight_requests and time.monotonic() < deadline and not stopped.is_set():
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Ends every connection and task. Idempotent."""
        await self._listener.close()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            await fleet.close()
        if self._batches is not None:
            await self._batches.close()
        if self._ledger is not None:
            await self._ledger.close()

    def _handle_view(self, view: ClusterView) -> None:
        self._served.update(view.adapters)
        self._on_view(view)

    # The methods below serve /admin.

    async def load_adapter(
        self, name: str, source: str, *, share: float | None = None, in_place: bool = False
    ) -> AdapterRevision:
        """See GatewayAdapters."""
        return await self.adapters.load(name, source, share=share, in_place=in_place)

    async def change_adapter(self, change: AdapterChange, name: str) -> Registry:
        """See GatewayAdapters."""
        return await self.adapters.change(change, name)

    async def drain_replica(self, replica_id: str, grace_s: float | None) -> None:
        """Takes a replica out of service. Raises RequestError for an unknown replica."""
        await self._controller.drain(replica_id, grace_s)

    def cluster_view(self) -> ClusterView:
        """The newest view without secrets. Raises ReplicaUnavailableError before the first."""
        if self.view is None:
            raise ReplicaUnavailableError("The controller has not answered yet.", remedy="Try again in a moment.")
        return without_secrets(self.view)
