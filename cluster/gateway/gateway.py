"""One gateway: opens the router, fleet, HTTP application, batches and listener, and closes them in reverse order.

Knows the parts of a gateway; no Ray (the controller is passed in) and no console. `serve` runs one in its own process, actor.py runs
additional ones.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.api.app import make_app
from cluster.api.context import CONTEXT, NO_BATCHES
from cluster.api.line_executor import ApiLineExecutor
from cluster.api.server.listener import Listener
from cluster.api.stored.executor import ApiExecutor
from cluster.config.cluster import ClusterConfig
from cluster.gateway.batch_shares import BatchShares
from cluster.gateway.batches import GatewayBatches, open_batches
from cluster.gateway.deployment import Deployment, Part, make_router
from cluster.gateway.operator import Operator
from cluster.gateway.preemption import ENDS_AHEAD_S, PreemptionShutdown, notice_for, unfinished_error
from cluster.keys.accounts import Accounts
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger, ledger_path
from cluster.protocol.names import member_of
from cluster.protocol.view import ClusterView
from cluster.router.routers import Routers
from cluster.system.tls import open_certificate
from cluster.tracing.request import open_tracing
from workers.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

SHUTTING_DOWN = "The server is shutting down."
ERROR_TIMEOUT_S = 1.0  # for ended streams to send their error


class Gateway:
    """`await Gateway(...).open()`, then `drain` and `close`. links: as in `make_app`.

    parts: the deployments that it serves, at least one; what is about the server comes from the first one's configuration.
    Raises ConfigError if a file of keys or certificates is missing or invalid, or if a data directory or store of batches was asked for
    and cannot be used.
    """

    def __init__(self, parts: Sequence[Part], *, links: Mapping[str, str] | None = None) -> None:
        config = parts[0].config
        self.gateway_id = f"g-{secrets.token_hex(3)}"
        self.url = ""
        self._config = config
        keys = None if config.api_keys is None else Path(config.api_keys)
        keyring = Keyring(keys, api_key=config.api_key)
        self._ledger = None if keys is None else Ledger(ledger_path(keys))
        self._certificate = open_certificate(config.tls_cert, config.tls_key)
        tracing = self._tracing = open_tracing(config.tracing, gateway_id=self.gateway_id)
        accounts = Accounts(num_gateways=config.num_gateways)
        routers = [make_router(part.config) for part in parts]
        self._routers = Routers(routers)
        opened = open_batches(config, routers[0], claim=ClusterConfig(tuple(part.config for part in parts)).claim)
        self._batches = opened if isinstance(opened, GatewayBatches) else None
        first = Deployment(parts[0], routers[0], batches=self._batches)
        more = [Deployment(p, r, beside=first.metrics) for p, r in zip(parts[1:], routers[1:], strict=True)]
        self.deployments = (first, *more)
        self.operator = Operator(self.deployments)
        self.router, self.metrics, self.adapters = first.router, first.metrics, first.adapters
        if self._certificate is not None:
            certificate = self._certificate
            self.metrics.watch_certificate(lambda: certificate.expires_at)
        if tracing is not None:
            self.metrics.watch_spans(lambda: tracing.num_dropped)
        app = make_app(
            router=first.router,
            tokenizer=first.text.tokenizer,
            chat_template=first.text.chat_template,
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
            metrics=first.metrics,
            admin=self.operator,
            batches=None if self._batches is None else self._batches.api,
            no_batches=opened if isinstance(opened, str) else NO_BATCHES,
            adapters=first.served,
            deployment=member_of(config.deployment),
            others=[deployment.served_model() for deployment in more],
            tracing=tracing,
        )
        api = app[CONTEXT]
        if self._batches is not None and more:
            self._batches.share = BatchShares(api.models).report
        self._executor = ApiLineExecutor(api, keyring=keyring, accounts=accounts, ledger=self._ledger)
        self._responses = ApiExecutor(api, keyring=keyring, accounts=accounts, ledger=self._ledger)
        self._listener = Listener(app, tls=None if self._certificate is None else self._certificate.context)
        self._preemption = PreemptionShutdown(self._routers, lambda: self.view, self.gateway_id)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def view(self) -> ClusterView | None:
        """The newest view of the server."""
        return self.operator.view

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
        self._tasks = [d.open(gateway_id=self.gateway_id, url=self.url) for d in self.deployments]
        self._tasks.append(asyncio.create_task(self._preemption.run(), name="preemption"))
        if self._batches is not None:
            self._tasks += self._batches.start(self._executor, self._responses)
            self._tasks += [d.stored_uses.watch(self._batches.adapters_of_responses) for d in self.deployments]
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
        self._routers.close(SHUTTING_DOWN)
        await self._listener.stop_accepting()
        stopped = stop_now or asyncio.Event()
        await self._until_empty(min(timeout_s, self._left_s()), stopped)
        if self._batches is not None:
            await self._batches.stop_responses()
        if self._routers.end_streams(unfinished_error(SHUTTING_DOWN)):
            await self._until_empty(ERROR_TIMEOUT_S, asyncio.Event())

    def _left_s(self) -> float:
        """Seconds until this node is preempted, less the time to end requests; infinite without a notice."""
        notice = None if self.view is None else notice_for(self.view, self.gateway_id, time.time())
        return math.inf if notice is None else max(0.0, notice.deadline - ENDS_AHEAD_S - time.time())

    async def _until_empty(self, timeout_s: float, stopped: asyncio.Event) -> None:
        deadline = time.monotonic() + timeout_s
        while self._routers.num_inflight_requests and time.monotonic() < deadline and not stopped.is_set():
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Ends every connection and task. Idempotent."""
        await self._listener.close()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(deployment.close() for deployment in self.deployments))
        if self._batches is not None:
            await self._batches.close()
        if self._ledger is not None:
            await self._ledger.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
