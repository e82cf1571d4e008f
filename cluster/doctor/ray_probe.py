"""Probes of a Ray cluster: one actor per node, which runs functions there and connects to the other nodes.

A probe reserves no CPU and no GPU, so it also starts on nodes that are busy serving. Knows Ray and TCP; what the probes run, and what
the results mean, is up to the caller.
"""

import asyncio
import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.facts import Link
from cluster.ray_runtime.internals import session_folder

CONNECT_TIMEOUT_S = 5.0
_TOKEN_BYTES = 16

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RayNode:
    node_id: str
    address: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[T]):
    """A node's answer. `value` is None if it gave none; `failure` then completes a sentence about the node."""

    value: T | None = None
    failure: str | None = None


def living_nodes() -> list[RayNode]:
    """The nodes that are alive, sorted by address."""
    found = [
        RayNode(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            num_cpus=node["Resources"].get("CPU", 0.0),
            num_gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (node.address, node.node_id))


class NodeProbe:
    """The actor that runs on a node."""

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)

    def temp_dir(self) -> str:
        """The folder where Ray keeps its files on this node."""
        return session_folder()

    def listen(self, host: str) -> int:
        """Starts an echo server and returns its port, which the kernel chooses, as for ranks and gateways. Raises OSError."""
        listener = socket.create_server((host, 0))
        threading.Thread(target=_echo, args=(listener,), name="echo", daemon=True).start()
        return int(listener.getsockname()[1])

    def reach(self, targets: Sequence[tuple[str, int]]) -> list[str | None]:
        """For each echo server: None if it was reached, else the reason."""
        with ThreadPoolExecutor(max(len(targets), 1)) as pool:
            return list(pool.map(_reach, targets))


def start_probe(node: RayNode) -> ActorHandle:
    """Starts a NodeProbe on that node."""
    strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    actor = ray.remote(NodeProbe).options(num_cpus=0, num_gpus=0, max_restarts=0, scheduling_strategy=strategy)
    return actor.remote()


class Probes:
    """One probe on each of `nodes`, started by `start`; `close` ends them. A call waits at most `timeout_s` for a node."""

    def __init__(
        self,
        nodes: Sequence[RayNode],
        *,
        timeout_s: float,
        start: Callable[[RayNode], ActorHandle] = start_probe,
    ) -> None:
        self.nodes = list(nodes)
        self._timeout_s = timeout_s
        self._given_up: dict[str, str] = {}  # reason by node id; a node that failed is not asked again
        self._actors = {node.node_id: start(node) for node in nodes}

    async def run(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[Answer[T]]:
        """The result of `function` on each node, in their order. `arguments` has one tuple per node."""
        calls = zip(self.nodes, arguments, strict=True)
        return await asyncio.gather(*(self._ask(node, "run", function, *own) for node, own in calls))

    async def temp_dirs(self) -> list[Answer[str]]:
        """The folder where Ray keeps its files, on each node."""
        return await asyncio.gather(*(self._ask(node, "temp_dir") for node in self.nodes))

    async def links(self) -> list[Link]:
        """Every ordered pair of the nodes that answer, all tried at the same time. Empty for a single node."""
        nodes = [node for node in self.nodes if node.node_id not in self._given_up]
        if len(nodes) < 2:
            return []
        ports = await asyncio.gather(*(self._ask(node, "listen", node.address) for node in nodes))
        listeners = list(zip(nodes, ports, strict=True))
        found = await asyncio.gather(*(self._reach(node, listeners) for node in nodes))
        return [link for links in found for link in links]

    def close(self) -> None:
        """Ends the probes' processes. Idempotent."""
        actors, self._actors = self._actors, {}
        for actor in actors.values():
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)

    async def _reach(self, node: RayNode, listeners: Sequence[tuple[RayNode, Answer[int]]]) -> list[Link]:
        others = [(other, port) for other, port in listeners if other is not node]
        targets = [(other.address, port.value) for other, port in others if port.value is not None]
        answer = await self._ask(node, "reach", targets)
        reached = iter([answer.failure] * len(targets) if answer.value is None else answer.value)
        return [
            Link(
                source=node.address,
                target=other.address,
                failure=f"no port could be opened there ({port.failure})" if port.value is None else next(reached),
            )
            for other, port in others
        ]

    async def _ask(self, node: RayNode, method: str, *arguments: Any) -> Answer[Any]:
        if (reason := self._given_up.get(node.node_id)) is not None:
            return Answer(failure=reason)
        actor = self._actors[node.node_id]
        try:
            async with asyncio.timeout(self._timeout_s):
                return Answer(value=await getattr(actor, method).remote(*arguments))
        except RayTaskError as e:
            return Answer(failure=f"{type(e.cause).__name__}: {e.cause}")
        except TimeoutError:
            reason = f"it did not answer within {self._timeout_s:g} s"
        except RayActorError as e:
            # The last line is what the actor's constructor raised, such as a module that is not installed there.
            reason = str(e).strip().splitlines()[-1].strip()
        except RayError as e:
            reason = f"{type(e).__name__}: {e}"
        self._given_up[node.node_id] = reason
        return Answer(failure=reason)


def _echo(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(CONNECT_TIMEOUT_S)
            connection.sendall(connection.recv(_TOKEN_BYTES))


def _reach(target: tuple[str, int]) -> str | None:
    """None if the target echoes a token, else the reason. The token shows that no other service answered at that address."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    try:
        with socket.create_connection(target, timeout=CONNECT_TIMEOUT_S) as connection:
            connection.sendall(token)
            if connection.recv(_TOKEN_BYTES) != token:
                return f"something else answers at {target[0]}"
    except TimeoutError:
        return f"no answer within {CONNECT_TIMEOUT_S:g} s"
    except OSError as e:
        return e.strerror or str(e)
    return None
