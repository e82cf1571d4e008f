"""Where a replica's ranks run: a placement group with a bundle per rank, and what is missing while it waits for resources.

Knows Ray's placement groups and nodes; knows no actors. One host is preferred: ranks on different hosts all-reduce over the network.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from cluster.ray_runtime.internals import available_resources
from workers.errors import ConfigError

log = logging.getLogger(__name__)

ONE_HOST_PATIENCE_S = 10.0  # a host that has room for all ranks gets this long to become free
POLL_S = 0.02
SLOW_POLL_S = 0.2  # after the first second: the wait may take hours
REASON_INTERVAL_S = 2.0

Resources = Mapping[str, float]


class Gang(Protocol):
    """Ranks that run together or not at all; an EngineConfig describes one."""

    @property
    def device(self) -> Literal["cpu", "cuda"]: ...

    @property
    def tensor_parallel_size(self) -> int: ...


def bundle_of(gang: Gang) -> dict[str, float]:
    """What one rank needs."""
    return {"CPU": 1.0, "GPU": 1.0} if gang.device == "cuda" else {"CPU": 1.0}


async def place(
    name: str,
    gang: Gang,
    *,
    timeout_s: float | None,
    on_group: Callable[[PlacementGroup], None],
    on_waiting: Callable[[str], None],
    spread: bool = False,
    detached: bool = True,
) -> dict[int, str]:
    """Reserves a bundle per rank; returns each rank's node id.

    on_group: called with every group made; the last one is the replica's. on_waiting: called every few seconds with what is missing on
    which node. spread: every rank on a node of its own. detached: the reservation outlives this process.
    Raises ConfigError with what is missing after `timeout_s`.
    """
    bundle, size = bundle_of(gang), gang.tensor_parallel_size
    began = time.monotonic()
    one_host = not spread and any(holds(node, bundle, size) for node in _totals().values())
    strategy = "STRICT_SPREAD" if spread else "STRICT_PACK" if one_host else "PACK"
    group = _make_group(name, bundle, size, strategy=strategy, detached=detached)
    on_group(group)
    next_reason = began + REASON_INTERVAL_S / 2
    # `ready()` would be a task, which takes a worker process of its own; the table is free.
    # On threads: these calls hang while Ray's control store is down, and gateways wait for this event loop.
    while (table := await asyncio.to_thread(placement_group_table, group))["state"] != "CREATED":
        waited = time.monotonic() - began
        if timeout_s is not None and waited > timeout_s:
            reason = await asyncio.to_thread(_missing_now, bundle, size)
            remedy = "Start Ray on more nodes, or lower --tensor-parallel-size."
            if gang.device == "cuda":
                remedy = "Start Ray on more nodes with GPUs, lower --tensor-parallel-size, or use --device cpu."
            raise ConfigError(
                f"The cluster had no room for the replica within {timeout_s:g} s. {reason}", remedy=remedy
            )
        if time.monotonic() > next_reason:
            next_reason += REASON_INTERVAL_S
            on_waiting(await asyncio.to_thread(_missing_now, bundle, size))
        if (
            one_host
            and waited > ONE_HOST_PATIENCE_S
            and fits_apart((await asyncio.to_thread(available_resources)).values(), bundle, size)
        ):
            log.warning("No single host has room for the %s ranks of %s: they are placed on several.", size, name)
            remove_placement_group(group)
            one_host = False
            group = _make_group(f"{name}-apart", bundle, size, strategy="PACK", detached=detached)
            on_group(group)
        await asyncio.sleep(POLL_S if waited < 1.0 else SLOW_POLL_S)
    return {int(rank): node for rank, node in table["bundles_to_node_id"].items()}


def holds(node: Resources, bundle: Resources, count: int) -> bool:
    """Whether `count` bundles fit into these resources."""
    return all(node.get(name, 0.0) >= amount * count for name, amount in bundle.items())


def fits_apart(nodes: Iterable[Resources], bundle: Resources, count: int) -> bool:
    """Whether `count` bundles fit onto these nodes together."""
    return sum(_num_bundles(node, bundle) for node in nodes) >= count


def missing(free: Mapping[str, Resources], total: Mapping[str, Resources], bundle: Resources, count: int) -> str:
    """One sentence: what is needed, and what each node (by address) has of it, free and in all."""
    need = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    nodes = "; ".join(
        f"{node} has "
        + ", ".join(f"{free.get(node, {}).get(name, 0):g} of {resources.get(name, 0):g} {name} free" for name in bundle)
        for node, resources in sorted(total.items())
    )
    ranks = f"{count} ranks with {need} each" if count > 1 else f"one rank with {need}"
    return f"Needed: {ranks}. Nodes: {nodes or 'none'}."


def node_ip(node_id: str) -> str:
    """The address of a node of the cluster."""
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)


def missing_for(gang: Gang, *, spread: bool = False) -> str | None:
    """What the gang lacks at this moment, in one sentence; None if there is room for it."""
    bundle, size = bundle_of(gang), gang.tensor_parallel_size
    free = available_resources().values()
    num_nodes = sum(holds(node, bundle, 1) for node in free)
    if num_nodes >= size if spread else fits_apart(free, bundle, size):
        return None
    return _missing_now(bundle, size)


def _make_group(name: str, bundle: dict[str, float], size: int, *, strategy: str, detached: bool) -> PlacementGroup:
    return placement_group([bundle] * size, strategy=strategy, name=name, lifetime="detached" if detached else None)


def _num_bundles(node: Resources, bundle: Resources) -> int:
    return min(int(node.get(name, 0.0) // amount) for name, amount in bundle.items())


def _totals() -> dict[str, Resources]:
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _missing_now(bundle: Resources, size: int) -> str:
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    free = {addresses[n]: r for n, r in available_resources().items() if n in addresses}
    total = {addresses[n]: r for n, r in _totals().items() if n in addresses}
    return missing(free, total, bundle, size)
