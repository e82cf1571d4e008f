"""The controller: one detached Ray actor that makes the cluster match its spec and reports the cluster's state to gateways.

Knows Ray, the supervisor and the autoscaler's loop; no tokens. It outlives every gateway, and Ray restarts it if it dies; it then finds
the running replicas by the names of their actors and adopts them. It connects to every replica itself to judge its health first-hand.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial

import ray

from cluster.adapters.registry import EMPTY, in_state
from cluster.adapters.store import AdapterStore, adapter_folder
from cluster.controller.adapter_content import content_of
from cluster.controller.adapters import AdapterHolder, AdapterKeeper
from cluster.controller.gateway_table import GatewayTable
from cluster.controller.preemption.act import PreemptionHandler
from cluster.controller.preemption.watch import NodeWatcher
from cluster.controller.registry_store import load_registry, save_registry
from cluster.controller.scaling import Scaling
from cluster.controller.spec_store import load_spec, save_spec
from cluster.controller.supervisor import Supervisor
from cluster.protocol.adapters import (
    HOW_TO_ENABLE,
    AdapterChange,
    AdapterRevision,
    Registry,
    RevisionState,
    no_adapters,
)
from cluster.protocol.names import replica_prefix
from cluster.protocol.report import GatewayReport
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import ClusterView, ReplicaRecord, ReplicaState
from cluster.ray_runtime.nodes import draining_nodes
from cluster.replicas.leftovers import find_ranks, remove_all
from cluster.replicas.replica import RayReplica
from workers.errors import ConfigError, ReplicaUnavailableError, RequestError
from workers.protocol import EngineFacts

log = logging.getLogger(__name__)

SCALING_INTERVAL_S = 1.0
# Each report takes 5 ms of CPU, from kernels that then wait for each other.
SYNC_WAIT_S = 0.25
STEADY_SYNC_WAIT_S = 1.0


class Controller:
    """Methods are called from gateways and the command line, all on the actor's event loop."""

    def __init__(self, deployment: str, spec: ClusterSpec, registry: Registry = EMPTY) -> None:
        logging.basicConfig(format="%(levelname)s controller %(name)s: %(message)s")
        logging.getLogger("cluster").setLevel(spec.log_level)
        self._deployment = deployment
        self._id = secrets.token_hex(4)
        self._spec = spec
        # Above all versions of an earlier controller, which gateways may still report as seen.
        self._version = time.time_ns() // 1_000_000
        self._changed = asyncio.Event()
        self._gateways = GatewayTable(started_at=time.monotonic())
        self._facts: EngineFacts | None = None
        self.adapters = self.make_keeper(registry)
        self._scaling = Scaling(spec)
        self._supervisor = Supervisor(
            self.make_replica,
            prefix=replica_prefix(deployment),
            num_streams=self._gateways.num_streams,
            on_change=self.note_change,
        )
        self._supervisor.drain_timeout_s = spec.drain_timeout_s
        self._preemption: PreemptionHandler | None = None  # until `start`
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Adopts the replicas that already run, then makes the cluster match the spec until `down`."""
        try:
            await self._adopt()
        except Exception as e:  # replicas that cannot be adopted are replaced
            log.exception("Adopting the running replicas failed: %s", e)
        self._set_desired(self._scaling.initial(len(self._live())))
        self._preemption = PreemptionHandler(self._supervisor, self.make_watcher, self.note_change)
        self._preemption.configure(self._spec)
        self._tasks = [
            asyncio.create_task(self._supervisor.run()),
            asyncio.create_task(self._scale_forever()),
            asyncio.create_task(self.adapters.run()),
        ]

    async def apply(self, spec: ClusterSpec) -> None:
        """Replaces the spec. Raises ConfigError if the deployment serves another model, or the model with another engine's settings."""
        is_other = (spec.engine, spec.model_name) != (self._spec.engine, self._spec.model_name)
        # A gateway without replicas, scaled to zero, still uses its own model's tokenizer.
        if is_other and (self._supervisor.records() or self._gateways):
            raise ConfigError(
                f"The deployment {self._deployment!r} on this Ray cluster serves {self._spec.model_name} with other settings.",
                remedy="Stop it with `tramontane down`, or start another next to it with --name.",
                param="--name",
            )
        self._spec = spec
        if is_other:
            self._facts = None
        if self._preemption is not None:
            self._preemption.configure(spec)
        self._scaling.configure(spec)
        self._supervisor.drain_timeout_s = spec.drain_timeout_s
        self._supervisor.forgive()
        self._set_desired(self._scaling.initial(len(self._live())))
        await asyncio.to_thread(save_spec, self._deployment, spec)

    async def sync(self, known: int, report: GatewayReport | None, node_id: str = "") -> ClusterView:
        """The view. Returns at once if it differs from version `known`, else after a while. report: the caller's load."""
        if report is not None:
            self._gateways.take(report, node_id=node_id, seen_version=known, now=time.monotonic())
            self._wake_for_demand(report)
        if known == self._version:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STEADY_SYNC_WAIT_S if self._is_steady else SYNC_WAIT_S):
                    await self._changed.wait()
        return self.view()

    @property
    def _is_steady(self) -> bool:
        """Whether no decision depends on what gateways report: the number of replicas is fixed, and nothing starts or drains."""
        is_fixed = self._spec.min_replicas == self._spec.max_replicas and not self._gateways.has_retiring
        return is_fixed and all(r.state is ReplicaState.READY for r in self._supervisor.records())

    def view(self) -> ClusterView:
        """The current state of the cluster."""
        return ClusterView(
            version=self._version,
            controller_id=self._id,
            spec=self._spec,
            replicas=self._supervisor.records(),
            gateways=self._gateways.records(),
            notices=() if self._preemption is None else self._preemption.notices,
            num_notices_total=0 if self._preemption is None else self._preemption.num_notices_total,
            num_desired=self._supervisor.desired,
            scaling_reason=self._scaling.reason,
            failure=self._supervisor.failure,
            facts=self._facts,
            adapters=self.adapters.registry,
        )

    async def drain(self, replica_id: str, grace_s: float | None = None, reason: str | None = None) -> None:
        """Takes a replica out of service without losing a stream. Raises RequestError for an unknown replica."""
        if replica_id not in {r.replica_id for r in self._supervisor.records()}:
            known = ", ".join(r.replica_id for r in self._supervisor.records()) or "none"
            raise RequestError(
                f"There is no replica {replica_id!r}.", remedy=f"The replicas are: {known}.", param="replica"
            )
        self._supervisor.drain(replica_id, grace_s=grace_s, reason=reason)

    async def leave(self, gateway_id: str) -> None:
        """A gateway is shutting down."""
        self._gateways.remove(gateway_id)

    async def load_adapter(
        self,
        revision: AdapterRevision,
        files: Mapping[str, bytes] | None = None,
        *,
        in_place: bool = False,
        again: bool = False,
    ) -> Registry | None:
        """See AdapterKeeper.load. Raises ConfigError where the engine has no adapters."""
        if not self._spec.engine.enable_lora:
            raise ConfigError(no_adapters(self._spec.model_name), remedy=HOW_TO_ENABLE, param="--enable-lora")
        return await self.adapters.load(revision, files, in_place=in_place, again=again)

    async def change_adapter(self, change: AdapterChange, name: str) -> Registry:
        """Raises RequestError for what is refused."""
        keeper = self.adapters
        return await {"promote": keeper.promote, "rollback": keeper.rollback, "unload": keeper.unload}[change](name)

    async def down(self) -> int:
        """Ends every replica and returns how many there were. The caller then ends this actor."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._preemption is not None:
            await self._preemption.close()
        count = len(self._supervisor.records())
        await self._supervisor.close()
        await self.adapters.end()
        return count

    async def _adopt(self) -> None:
        for (replica_id, incarnation), descriptions in (await find_ranks(self._deployment)).items():
            replica = self.make_replica(replica_id, incarnation)
            try:
                if replica_id in {r.replica_id for r in self._supervisor.records()}:
                    raise ReplicaUnavailableError(f"There is another replica {replica_id}.")
                self._supervisor.adopt(await replica.adopt(descriptions))
                log.info("Replica %s was found running and adopted.", replica_id)
            except Exception as e:  # one broken replica must not keep the others from being adopted
                log.warning("Replica %s was found running, cannot be adopted and is stopped: %s", replica_id, e)
                await replica.close(str(e))
        # Also half-started replicas, and the placement groups of replicas that ended on their own.
        adopted = {(r.replica_id, r.incarnation) for r in self._supervisor.records()}
        await asyncio.to_thread(remove_all, self._deployment, keep=adopted)

    @property
    def placement_timeout_s(self) -> float | None:
        """How long a replica that starts now may wait for room; None for no limit, once the cluster has held one and may grow."""
        may_wait = self._facts is not None and not self._spec.single_host
        return None if may_wait else self._spec.placement_timeout_s

    def make_replica(self, replica_id: str, incarnation: str | None = None) -> RayReplica:
        """A replica that is not started yet. Tests without Ray override this."""
        return RayReplica(
            replica_id,
            self._spec.engine,
            deployment=self._deployment,
            incarnation=incarnation,
            single_host=self._spec.single_host,
            log_level=self._spec.log_level,
            tracing=self._spec.tracing,
            placement_timeout_s=self.placement_timeout_s,
            bring_adapters=self.adapters.bring if self._spec.engine.enable_lora else None,
            on_change=self.note_change,
        )

    def make_keeper(self, registry: Registry) -> AdapterKeeper:
        """What cares for the adapters. Tests without Ray override this."""
        return AdapterKeeper(
            AdapterStore(adapter_folder(self._deployment, self._spec.data_dir)),
            registry,
            serving=self.serving_adapters,
            save=partial(save_registry, self._deployment),
            on_change=self.note_change,
            num_streams=self.num_adapter_streams,
            may_serve_alone=self.is_scaled_to_zero,
            content=partial(content_of, single_host=self._spec.single_host),
        )

    def make_watcher(self, on_notice: Callable[[], None]) -> NodeWatcher:
        """The source of preemption notices. Tests without Ray override this."""
        here = ray.get_runtime_context().get_node_id()
        return NodeWatcher(on_notice, here=here, log_level=self._spec.log_level)

    def note_change(self) -> None:
        """The record of a replica has changed: makes a new version of the view."""
        self._version += 1
        draining = set()
        for record in self._supervisor.records():
            self._facts = record.facts or self._facts
            if record.state is ReplicaState.DRAINING:
                draining.add(record.replica_id)
        retiring = in_state(self.adapters.registry, RevisionState.RETIRING)
        self._gateways.note_version(self._version, draining=draining, retiring=[r.id for r in retiring])
        self._changed.set()

    def _live(self) -> list[ReplicaRecord]:
        gone = (ReplicaState.DRAINING, ReplicaState.LOST)
        return [r for r in self._supervisor.records() if r.state not in gone]

    def is_scaled_to_zero(self) -> bool:
        return self._supervisor.desired == 0 and self._facts is not None

    def serving_adapters(self) -> dict[object, AdapterHolder]:
        serving = [(replica.record(), replica.adapters) for replica in self._supervisor.serving()]
        return {(record.replica_id, record.incarnation): adapters for record, adapters in serving}

    def num_adapter_streams(self, revision_id: str) -> int | None:
        """See GatewayTable."""
        return self._gateways.num_adapter_streams(revision_id, version=self._version, now=time.monotonic())

    def _set_desired(self, desired: int) -> None:
        if desired != self._supervisor.desired:
            self._supervisor.desired = desired
            self.note_change()
            self._supervisor.wake()

    def _wake_for_demand(self, report: GatewayReport) -> None:
        """Scales up from zero at once, so that a waiting request need not wait for the scaling loop too."""
        if self._supervisor.desired or not self._spec.max_replicas:
            return
        if report.num_queued:
            self._set_desired(self._scaling.wake())
        elif any(batch.remaining_tokens for batch in report.batches):
            self._set_desired(self._scaling.wake_for_batch())

    async def _scale_forever(self) -> None:
        while True:
            await asyncio.sleep(SCALING_INTERVAL_S)
            try:
                self._round(await asyncio.to_thread(draining_nodes))
            except Exception as e:  # an error in one round must not end the scaling
                log.exception("A scaling round failed: %s", e)

    def _round(self, draining: Mapping[str, int]) -> None:
        now = time.monotonic()
        self._gateways.drop_silent(now)
        if self._preemption is not None:
            self._preemption.round(draining, gateway_nodes=self._gateways.nodes())
        desired = self._scaling.decide(self._supervisor.records(), self._gateways.reports(), now)
        if self._facts is None:  # requests cannot be checked before a first replica has reported the model's limits
            desired = max(desired, min(1, self._spec.max_replicas))
        self._set_desired(desired)


class ControllerActor(Controller):
    """The Ray actor. Ray restarts it after its process died."""

    async def __init__(self, deployment: str, spec: ClusterSpec) -> None:  # type: ignore[misc]  # Ray awaits it
        saved = await asyncio.to_thread(load_spec, deployment)
        super().__init__(deployment, saved or spec, await asyncio.to_thread(load_registry, deployment))
        await self.start()
