"""One deployment at this gateway: its router, adapters and metrics, and, while the gateway is open, its connections to the replicas.

A gateway has one of these, or several. Knows the parts that belong to one model; no HTTP server and no batches.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.adapters.served import ServedAdapters
from cluster.adapters.stored_uses import StoredUses
from cluster.api.generation.structured import Grammars
from cluster.api.served_model import ServedModel
from cluster.config.serve import ServeConfig
from cluster.gateway.adapters import GatewayAdapters
from cluster.gateway.batches import GatewayBatches
from cluster.gateway.fleet import Fleet
from cluster.metrics.gateway import Metrics
from cluster.protocol.names import member_of
from cluster.protocol.view import ClusterView
from cluster.router.router import Router

if TYPE_CHECKING:
    from cluster.controller.client import ControllerClient
    from cluster.text.load import LoadedText


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a gateway needs to know of a deployment. on_view: called with every view of it."""

    config: ServeConfig
    controller: "ControllerClient"
    text: "LoadedText"
    on_view: Callable[[ClusterView], None] = lambda _: None


class Deployment:
    """`open` it with the gateway's name and address, and `close` it.

    beside: the metrics of the gateway's first deployment. batches: the gateway's, which count among the metrics of the first.
    """

    def __init__(
        self,
        part: Part,
        router: Router,
        *,
        beside: Metrics | None = None,
        batches: GatewayBatches | None = None,
    ) -> None:
        config = self.config = part.config
        self.controller = part.controller
        self.router = router
        self.text = part.text
        self.metrics = Metrics(
            router,
            model_name=config.model_name,
            prefix=config.metrics_prefix,
            view=lambda: self.view,
            batches=None if batches is None else lambda: batches.running,
            responses=None if batches is None else batches.response_counts,
            beside=beside,
        )
        self.served = ServedAdapters(on_gone=self.metrics.forget_adapters)
        self.stored_uses = StoredUses(self.served)
        self.adapters = GatewayAdapters(config, part.controller, self.served)
        self._on_view = part.on_view
        self._fleet: Fleet | None = None

    @property
    def name(self) -> str:
        return self.config.deployment

    @property
    def view(self) -> ClusterView | None:
        """The newest view of it."""
        return None if self._fleet is None else self._fleet.view

    def served_model(self) -> ServedModel:
        """What requests see of it."""
        return ServedModel(
            names=(self.config.model_name,),
            router=self.router,
            tokenizer=self.text.tokenizer,
            chat_template=self.text.chat_template,
            metrics=self.metrics,
            grammars=Grammars(self.text.tokenizer),
            sampling_defaults=self.config.sampling_defaults,
            adapters=self.served,
            deployment=member_of(self.config.deployment),
        )

    def open(self, *, gateway_id: str, url: str) -> asyncio.Task[None]:
        """Starts to sync with its controller. The task ends only on an error."""
        self._fleet = Fleet(
            self.controller,
            self.router,
            gateway_id=gateway_id,
            url=url,
            on_view=self._handle_view,
            adapter_streams=self.stored_uses.streams,
        )
        return asyncio.create_task(self._fleet.run(), name=f"fleet of {self.config.model_name}")

    async def close(self) -> None:
        """Leaves the controller and the replicas. The task of `open` has ended before. Idempotent."""
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            await fleet.close()

    def _handle_view(self, view: ClusterView) -> None:
        self.served.update(view.adapters)
        self._on_view(view)


def make_router(config: ServeConfig) -> Router:
    """The router that a deployment's configuration asks for."""
    return Router(
        policy=config.routing_policy,
        max_queued_tokens=config.max_queued_tokens,
        queue_timeout_s=config.queue_timeout_s,
    )
