"""The views of several deployments as one: what commands, the page and a preempted gateway see of the whole server.

Each deployment has a controller of its own. They see the same nodes and gateways, and replicas with different ids. Knows views only.
"""

from collections.abc import Sequence
from dataclasses import replace

from cluster.protocol.adapters import Registry
from cluster.protocol.names import member_of
from cluster.protocol.view import ClusterView, DeploymentRecord, StartFailure


def joined_view(views: Sequence[tuple[str, ClusterView]]) -> ClusterView | None:
    """views: those that are there, each with its deployment's name. None without any; one alone is as it is."""
    if len(views) < 2:
        return views[0][1] if views else None
    found = [view for _, view in views]
    registries = [view.adapters for view in found]
    notices = {n.node_id: n for view in reversed(found) for n in view.notices}
    gateways = {g.gateway_id: g for view in found for g in view.gateways}
    counted = [
        replace(
            gateway,
            num_running=sum(g.num_running for view in found for g in view.gateways if g.gateway_id == gateway_id),
            num_queued=sum(g.num_queued for view in found for g in view.gateways if g.gateway_id == gateway_id),
        )
        for gateway_id, gateway in gateways.items()
    ]
    return replace(
        found[0],
        version=sum(view.version for view in found),
        replicas=tuple(replica for view in found for replica in view.replicas),
        gateways=tuple(counted),
        notices=tuple(notices.values()),
        num_notices_total=max(view.num_notices_total for view in found),
        num_desired=sum(view.num_desired for view in found),
        failure=_failure(views),
        adapters=Registry(
            adapters=tuple(adapter for registry in registries for adapter in registry.adapters),
            revisions=tuple(revision for registry in registries for revision in registry.revisions),
        ),
        deployments=tuple(_record(name, view) for name, view in views),
    )


def _failure(views: Sequence[tuple[str, ClusterView]]) -> StartFailure | None:
    """The first, with its deployment's name."""
    for name, view in views:
        if view.failure is not None:
            return replace(view.failure, message=f"{member_of(name) or name}: {view.failure.message}")
    return None


def _record(name: str, view: ClusterView) -> DeploymentRecord:
    return DeploymentRecord(
        name=member_of(name) or name,
        replica_ids=tuple(r.replica_id for r in view.replicas),
        num_desired=view.num_desired,
        scaling_reason=view.scaling_reason,
        spec=view.spec,
        failure=view.failure,
        facts=view.facts,
        adapters=tuple(adapter.name for adapter in view.adapters.adapters),
    )
