"""What Ray knows about its nodes, what they say about themselves, and how Ray is told that one is preempted. Decides nothing.

Ray remembers a drained node across a restart of the controller, places nothing new on it, and its autoscaler starts another one in its
place. The node's Ray ends by itself when nothing runs there any more. Draining cannot be undone: drain only nodes that are certain to end.
"""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray_runtime import internals

log = logging.getLogger(__name__)
T = TypeVar("T")


def draining_nodes() -> Mapping[str, int]:
    """Node id -> when it ends, in milliseconds since 1970, 0 when unknown."""
    try:
        return internals.draining_nodes()
    except (RayError, RuntimeError) as e:
        log.debug("Ray does not say which nodes are draining: %s", e)
        return {}


def node_addresses() -> dict[str, str]:
    """Node id -> its address, of every living node. Blocks."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def run_on_cpu_nodes(function: Callable[[], T], *, timeout_s: float) -> list[tuple[str, T | None]]:
    """(address, result) of every living node that has a CPU for Ray, sorted by address; None where there is no result in time. Blocks.

    Takes no CPU of the nodes, so it also runs where all are in use. `function` is found by its name, as it is installed on the node.
    """
    remote = ray.remote(function)
    nodes = sorted(
        (node["NodeManagerAddress"], node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    )
    calls = [
        remote.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote()
        for _, node_id in nodes
    ]
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    found: list[tuple[str, T | None]] = []
    for (address, _), call in zip(nodes, calls, strict=True):
        result = None
        if call in answered:
            try:
                result = ray.get(call)
            except RayError as e:
                log.warning("Node %s does not run Tramontane: %s", address, str(e).strip().splitlines()[-1])
        found.append((address, result))
    return found


def drain_node(node_id: str, reason: str, deadline: float) -> None:
    """Tells Ray that the node is preempted at `deadline` (time.time()). Blocks. Never raises: preemption is handled without Ray too."""
    try:
        accepted, why = internals.drain_node(node_id, reason, deadline=deadline)
    except (RayError, RuntimeError) as e:
        accepted, why = False, repr(e)
    if not accepted:
        log.warning("Ray refuses to drain the preempted node %s: %s", node_id[:6], why)
