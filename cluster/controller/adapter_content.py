"""What ranks need of an adapter: the folder on this node, and its bytes in Ray's object store for ranks on other nodes. Knows Ray."""

import asyncio

import ray

from cluster.adapters.store import AdapterStore
from cluster.protocol.adapters import AdapterRevision
from cluster.replicas.adapter_files import AdapterContent
from workers.errors import CheckpointError


async def content_of(revision: AdapterRevision, store: AdapterStore, *, single_host: bool) -> AdapterContent:
    """single_host: no rank is on another node. The bytes leave the object store with the returned value. Raises CheckpointError."""
    if not await asyncio.to_thread(store.has, revision.digest):
        raise CheckpointError(
            f"The files of the adapter {revision.id} are gone from {store.folder}.",
            remedy="Unload it, and load it again.",
        )
    folder = str(store.path(revision.digest))
    if single_host:
        return AdapterContent(revision=revision.id, folder=folder)
    files = await asyncio.to_thread(lambda: ray.put(store.read(revision.digest)))
    return AdapterContent(
        revision=revision.id, folder=folder, node_id=ray.get_runtime_context().get_node_id(), files=[files]
    )
