"""What Ray itself knows of nodes that go away, and is told of them. Knows Ray's control store; decides nothing.

Ray keeps this over a restart of the controller, places nothing new on such a node, and its autoscaler brings another one in its place. A
node's Ray ends by itself when nothing runs on it any more. There is no way back, so only nodes that surely go are told of.
"""

import logging
from collections.abc import Mapping

import ray
from ray.exceptions import RayError

log = logging.getLogger(__name__)


def draining_nodes() -> Mapping[str, int]:
    """Node id -> when it goes, in milliseconds since 1970, 0 when unknown."""
    from ray._private.state import state

    try:
        return state.get_draining_nodes()
    except (RayError, RuntimeError) as e:
        log.debug("Ray does not say which nodes are draining: %s", e)
        return {}


def node_addresses() -> dict[str, str]:
    """Node id -> its address, of every node that lives. Blocks."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def drain_node(node_id: str, reason: str, deadline: float) -> None:
    """Tells Ray that the node goes away at `deadline` (time.time()). Blocks. Never raises: the rest goes on without."""
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    try:
        kind = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = global_worker.gcs_client.drain_node(node_id, kind, reason, int(deadline * 1000))
    except (RayError, RuntimeError) as e:
        accepted, why = False, repr(e)
    if not accepted:
        log.warning("Ray was told that the node %s goes away and refuses to drain it: %s", node_id[:6], why)
