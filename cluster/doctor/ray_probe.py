"""Looks at the nodes of a Ray cluster from within: an actor on each that runs what it is given, and connects to the others.

Takes no CPU and no GPU of Ray's, so that it runs beside whatever serves there. Knows Ray and TCP; what is looked at, and what
that means, is the caller's.
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
    """What a node answered or, with None, why it did not: `failure` ends a sentence about the node."""

    value: T | None = None
    failure: str | None = None


def living_nodes() -> list[RayNode]:
    """By address."""
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
    """What runs on a node."""

    def run(self, look: Callable[..., T], *arguments: Any) -> T:
        return look(*arguments)

    def temp_dir(self) -> str:
        """Where this node's Ray keeps its files."""
        return str(ray._private.worker.global_worker.node.get_temp_dir_path())

    def listen(self, host: str) -> int:
        """Sends back what it receives, on a port the kernel chooses, as ranks and gateways find theirs. Raises OSError."""
        listener = socket.create_server((host, 0))
        threading.Thread(target=_echo, args=(listener,), name="echo", daemon=True).start()
        return int(listener.getsockname()[1])

    def reach(self, targets: Sequence[tuple[str, int]]) -> list[str | None]:
        """Of each listener: None, or why it was not reached."""
        with ThreadPoolExecutor(max(len(targets), 1)) as pool:
            return list(pool.map(_reach, targets))


class Probes:
    """A probe on each of `nodes`; `close` ends them."""

    def __init__(self, nodes: Sequence[RayNode], *, timeout_s: float) -> None:
        self.nodes = list(nodes)
        self._timeout_s = timeout_s
        self._given_up: dict[str, str] = {}  # by node, with the reason: a node is waited for once
        self._actors: dict[str, ActorHandle] = {
            node.node_id: ray.remote(NodeProbe)
            .options(
                num_cpus=0,
                num_gpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            )
            .remote()
            for node in nodes
        }

    async def run(self, look: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[Answer[T]]:
        """The result of `look` from each node, in their order; `arguments` has those of each."""
        calls = zip(self.nodes, arguments, strict=True)
        return await asyncio.gather(*(self._ask(node, "run", look, *own) for node, own in calls))

    async def temp_dirs(self) -> list[Answer[str]]:
        """Where each node's Ray keeps its files."""
        return await asyncio.gather(*(self._ask(node, "temp_dir") for node in self.nodes))

    async def links(self) -> list[Link]:
        """Every ordered pair of the nodes that answer, all tried at the same time. None with a single node."""
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
                failure=f"nothing could listen there ({port.failure})" if port.value is None else next(reached),
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
            reason = f"it gave no answer in {self._timeout_s:g} s"
        except RayActorError as e:
            # What the actor's constructor raised, such as a module that is not installed there, is the last line.
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
    """Connects and has a token sent back: something else may answer at that address in between."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    try:
        with socket.create_connection(target, timeout=CONNECT_TIMEOUT_S) as connection:
            connection.sendall(token)
            if connection.recv(_TOKEN_BYTES) != token:
                return f"something else answers at {target[0]}"
    except TimeoutError:
        return f"no answer in {CONNECT_TIMEOUT_S:g} s"
    except OSError as e:
        return e.strerror or str(e)
    return None
