"""What an operator asks of this gateway, for the deployment that it concerns: drains, adapters, the state of the whole server.

Knows which deployment has a replica or an adapter. Serves /admin and the commands that use it.
"""

from collections.abc import Sequence

from cluster.adapters.registry import find_adapter, find_revision
from cluster.gateway.deployment import Deployment
from cluster.gateway.joined_view import joined_view
from cluster.protocol.adapters import AdapterChange, AdapterRevision, Registry
from cluster.protocol.view import ClusterView, without_secrets
from workers.errors import ReplicaUnavailableError, RequestError


class Operator:
    """An Admin (cluster/api/context.py)."""

    def __init__(self, deployments: Sequence[Deployment]) -> None:
        self._deployments = tuple(deployments)

    @property
    def view(self) -> ClusterView | None:
        """The newest view of the server; None before the first."""
        return joined_view([(d.name, view) for d in self._deployments if (view := d.view) is not None])

    def cluster_view(self) -> ClusterView:
        """The newest view without secrets. Raises ReplicaUnavailableError before the first."""
        view = self.view
        if view is None:
            raise ReplicaUnavailableError("The controller has not answered yet.", remedy="Try again in a moment.")
        return without_secrets(view)

    async def drain_replica(self, replica_id: str, grace_s: float | None) -> None:
        """Takes a replica out of service. Raises RequestError for an unknown replica."""
        views = [(d, d.view) for d in self._deployments]
        known = [(d, r.replica_id) for d, view in views if view is not None for r in view.replicas]
        owner = next((d for d, name in known if name == replica_id), None)
        if owner is None and len(self._deployments) > 1:
            names = ", ".join(name for _, name in known) or "none"
            raise RequestError(
                f"There is no replica {replica_id!r}.", remedy=f"The replicas are: {names}.", param="replica"
            )
        # The only controller may know a replica that is not in the view yet.
        await (owner or self._deployments[0]).controller.drain(replica_id, grace_s)

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        share: float | None = None,
        in_place: bool = False,
        base_model: str | None = None,
    ) -> AdapterRevision:
        """See GatewayAdapters. Raises RequestError if it is not clear which model the adapter belongs to."""
        owner = self._owner_of_new(name, base_model)
        taken = next((d for d in self._deployments if d is not owner and _has_name(d, name)), None)
        if taken is not None:
            raise RequestError(
                f"{name!r} is a name of the deployment of {taken.config.model_name!r}.",
                remedy="Choose another name for the adapter.",
                param="lora_name",
            )
        return await owner.adapters.load(name, source, share=share, in_place=in_place)

    async def change_adapter(self, change: AdapterChange, name: str) -> Registry:
        """See GatewayAdapters."""
        owner = next((d for d in self._deployments if _has_adapter(d, name)), self._deployments[0])
        return await owner.adapters.change(change, name)

    def _owner_of_new(self, name: str, base_model: str | None) -> Deployment:
        if base_model is not None:
            found = [d for d in self._deployments if base_model == d.config.model_name]
        else:
            # A new revision goes to where the adapter is.
            found = [d for d in self._deployments if _has_adapter(d, name)] or [
                d for d in self._deployments if d.config.engine.enable_lora
            ]
        if len(found) == 1 or len(self._deployments) == 1:
            return found[0] if found else self._deployments[0]
        names = " or ".join(repr(d.config.model_name) for d in found or self._deployments)
        if base_model is not None:
            raise RequestError(
                f"{base_model!r} is not a served model.", remedy=f"Send {names}.", param="base_model_name"
            )
        if not found:
            return self._deployments[0]  # which says how to enable adapters
        raise RequestError(
            "This server has several models with adapters.",
            remedy=f"Send {names} as 'base_model_name'.",
            param="base_model_name",
            code="missing_required_parameter",
        )


def _has_adapter(deployment: Deployment, name: str) -> bool:
    registry = deployment.served.registry
    return find_adapter(registry, name) is not None or any(r.name == name for r in registry.revisions)


def _has_name(deployment: Deployment, name: str) -> bool:
    known = find_revision(deployment.served.registry, name) is not None
    return known or name == deployment.config.model_name or find_adapter(deployment.served.registry, name) is not None
