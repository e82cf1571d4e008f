"""What Ray knows about its nodes, and how it is told that one is preempted. Decides nothing.

Ray remembers a drained node across a restart of the controller, places nothing new on it, and its autoscaler starts another one in its
place. The node's Ray ends by itself when nothing runs there any more. Draining cannot be undone: drain only nodes that are certain to end.
"""

import logging
from collections.abc import Mapping

import ray
from ray.exceptions import RayError

from cluster.ray_runtime import internals

log = logging.getLogger(__name__)


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


def drain_node(node_id: str, reason: str, deadline: float) -> None:
    """Tells Ray that the node is preempted at `deadline` (time.time()). Blocks. Never raises: preemption is handled without Ray too."""
    try:
        accepted, why = internals.drain_node(node_id, reason, deadline=deadline)
    except (RayError, RuntimeError) as e:
        accepted, why = False, repr(e)
    if not accepted:
        log.warning("Ray refuses to drain the preempted node %s: %s", node_id[:6], why)
