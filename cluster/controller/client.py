"""Finds, starts and calls the controller, which may restart at any moment. Knows Ray; passes values through.

Every method raises the controller's own TramontaneErrors, and ReplicaUnavailableError while the controller cannot be reached.
"""

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util import list_named_actors

from cluster.controller.registry_store import delete_registry
from cluster.controller.spec_store import delete_spec
from cluster.protocol.adapters import AdapterChange, AdapterRevision, Registry
from cluster.protocol.names import full_name, member_of
from cluster.protocol.report import GatewayReport
from cluster.protocol.spec import ClusterSpec
from cluster.protocol.view import ClusterView
from cluster.replicas.leftovers import remove_all
from workers.errors import ReplicaUnavailableError, TramontaneError

log = logging.getLogger(__name__)

CONTROLLER_NAME = "tramontane-controller"
_CONTROLLER = re.compile(re.escape(CONTROLLER_NAME) + r"(\.(?P<member>[a-z0-9-]+))?")
HEAD_NODE = "node:__internal_head__"  # the resource that marks Ray's head node
CALL_TIMEOUT_S = 10.0
DOWN_TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 330.0  # of an adapter: longer than the controller waits for its replicas
RETRY_S = 0.5
T = TypeVar("T")


class ControllerClient:
    """Use in a process connected to Ray in the deployment's namespace. deployment: as in protocol/names.py."""

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment
        self._name = _controller_name(deployment)
        self._actor: ActorHandle | None = None

    @property
    def exists(self) -> bool:
        """Whether a controller of this deployment is running."""
        return self._find() is not None

    async def start(self, spec: ClusterSpec) -> None:
        """Applies `spec` to the running controller, or starts one on the head node. Raises ConfigError."""
        from cluster.controller.controller import ControllerActor

        self._actor = (
            ray.remote(ControllerActor)
            .options(
                name=self._name,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_concurrency=1000,
                num_cpus=0,
                resources={HEAD_NODE: 0.001},  # all of Ray ends with that node anyway
            )
            .remote(self.deployment, spec)
        )
        await self._call("apply", spec, timeout_s=60.0)

    async def sync(self, known: int, report: GatewayReport | None) -> ClusterView:
        """The view, as soon as it differs from version `known`, after at most a second."""
        return await self._call("sync", known, report, ray.get_runtime_context().get_node_id())

    async def drain(self, replica_id: str, grace_s: float | None) -> None:
        """Raises RequestError for an unknown replica."""
        await self._call("drain", replica_id, grace_s)

    async def load_adapter(
        self,
        revision: AdapterRevision,
        read: Callable[[], Mapping[str, bytes]],
        *,
        in_place: bool,
        timeout_s: float = LOAD_TIMEOUT_S,
    ) -> Registry:
        """Returns when all replicas have it; asks again where the controller restarts meanwhile. read: its files, for another node.

        Raises RequestError and ConfigError for what is refused, CheckpointError if a replica cannot load it.
        """
        again, files = False, None
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                left_s = deadline - time.monotonic()
                load = partial(self._call, "load_adapter", revision, files, in_place=in_place, again=again)
                registry: Registry | None = await load(timeout_s=left_s)
            except ReplicaUnavailableError:
                again = True
                if deadline - time.monotonic() < RETRY_S:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                if registry is not None:
                    return registry
                files = await asyncio.to_thread(read)

    async def change_adapter(self, change: AdapterChange, name: str) -> Registry:
        """Raises RequestError for what is refused."""
        registry: Registry = await self._call("change_adapter", change, name)
        return registry

    async def leave(self, gateway_id: str) -> None:
        """Tells the controller that this gateway is shutting down."""
        await self._call("leave", gateway_id)

    async def stop_replicas(self) -> None:
        """Ends every replica in order if the controller answers. For a caller that stops Ray next, which ends the rest."""
        if self._actor is not None:
            with contextlib.suppress(TramontaneError):
                await self._call("down", timeout_s=CALL_TIMEOUT_S)

    async def down(self) -> int:
        """Ends every replica and the controller, even if the controller does not answer. Returns how many ranks were still running."""
        with contextlib.suppress(TramontaneError):
            await self._call("down", timeout_s=DOWN_TIMEOUT_S)
        if (actor := self._find()) is not None:
            ray.kill(actor)
        delete_spec(self.deployment)
        delete_registry(self.deployment)
        return remove_all(self.deployment)

    async def _call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S, **options: Any) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                # The lookup hangs while Ray's control store is down; the streams of this process must not.
                actor = self._actor = self._actor or await _in_daemon_thread(self._find)
                if actor is None:
                    raise ReplicaUnavailableError(
                        f"The controller of {self.deployment!r} is not running on this Ray cluster."
                    )
                return await getattr(actor, method).remote(*args, **options)
        except RayTaskError as e:
            if isinstance(e.cause, TramontaneError):
                raise e.cause from None
            raise ReplicaUnavailableError(f"The controller failed: {e.cause!r}.") from e
        except (RayError, TimeoutError) as e:
            self._actor = None
            raise ReplicaUnavailableError(f"The controller cannot be reached: {type(e).__name__}.") from e

    def _find(self) -> ActorHandle | None:
        with contextlib.suppress(ValueError):
            return ray.get_actor(self._name)
        return None


def running_deployments(server: str) -> list[str]:
    """The deployments of this server, by name, that have a controller in this namespace."""
    found = (_CONTROLLER.fullmatch(name) for name in list_named_actors())
    return sorted(full_name(server, match["member"]) for match in found if match is not None)


def _controller_name(deployment: str) -> str:
    member = member_of(deployment)
    return CONTROLLER_NAME if member is None else f"{CONTROLLER_NAME}.{member}"


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Returns the result of `work`. Unlike with asyncio.to_thread, a hanging call keeps neither the loop nor the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            finish = partial(done.set_result, work())
        except Exception as e:
            finish = partial(done.set_exception, e)
        with contextlib.suppress(RuntimeError):  # the loop ended in the meantime
            loop.call_soon_threadsafe(lambda: done.done() or finish())

    threading.Thread(target=run, name="controller-lookup", daemon=True).start()
    return await done
