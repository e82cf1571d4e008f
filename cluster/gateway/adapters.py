"""What this gateway does with adapters: takes in what is loaded through it, asks the controller, and follows the registry.

Knows the controller's client, the store of this machine and the engine's settings; no Ray and no HTTP.
"""

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from cluster.adapters.registry import find_revision
from cluster.adapters.served import ServedAdapters
from cluster.adapters.source import take_in
from cluster.adapters.store import AdapterStore, adapter_folder
from cluster.api.server.errors import NotFoundError
from cluster.config.serve import ServeConfig
from cluster.protocol.adapters import (
    HOW_TO_ENABLE,
    AdapterChange,
    AdapterRevision,
    Registry,
    no_adapters,
)
from workers.errors import CheckpointError, ConfigError, RequestError

if TYPE_CHECKING:
    from cluster.controller.client import ControllerClient

DISABLED = "lora_disabled"
SEEN_TIMEOUT_S = 5.0
STARTUP_TIMEOUT_S = 86_400.0  # a first replica may wait for its machine; the command that starts it says so


class GatewayAdapters:
    """Every method raises RequestError where the server was started without adapters."""

    def __init__(self, config: ServeConfig, controller: "ControllerClient", served: ServedAdapters) -> None:
        self._config = config
        self._controller = controller
        self._served = served
        self._store = AdapterStore(adapter_folder(config.deployment, config.data_dir))

    async def load(
        self,
        name: str,
        source: str,
        *,
        share: float | None = None,
        in_place: bool = False,
        while_starting: bool = False,
    ) -> AdapterRevision:
        """Returns the revision when all replicas have it, and this gateway serves it. while_starting: waits as long as the first replica
        takes.

        Raises RequestError for what is refused, NotFoundError for a source that is not there.
        """
        self._check_enabled()
        if name == self._config.model_name:
            raise RequestError(
                f"{name!r} is the name of the model itself.",
                remedy="Choose another name for the adapter.",
                param="lora_name",
            )
        try:
            take = partial(take_in, name, source, store=self._store, engine=self._config.engine, share=share)
            revision = await asyncio.to_thread(take)
        except ConfigError as e:
            raise NotFoundError(e.message, remedy=e.remedy, param="lora_path", code="lora_not_found") from e
        except CheckpointError as e:
            raise RequestError(e.message, remedy=e.remedy, param="lora_path", code="invalid_adapter") from e
        try:
            read = partial(self._store.read, revision.digest)
            more = {"timeout_s": STARTUP_TIMEOUT_S} if while_starting else {}
            registry = await self._controller.load_adapter(revision, read, in_place=in_place, **more)
        except (CheckpointError, ConfigError) as e:
            raise RequestError(e.message, remedy=e.remedy, param="lora_path", code="invalid_adapter") from e
        finally:
            self._store.release(revision.digest)
        await self._until_seen(registry)
        return find_revision(registry, revision.id) or revision

    async def change(self, change: AdapterChange, name: str) -> Registry:
        """Returns when this gateway has seen it. Raises RequestError for what is refused."""
        self._check_enabled()
        try:
            registry = await self._controller.change_adapter(change, name)
        except RequestError as e:
            if e.code != "lora_not_found":
                raise
            raise NotFoundError(e.message, remedy=e.remedy, param=e.param, code=e.code) from e
        await self._until_seen(registry)
        return registry

    async def _until_seen(self, registry: Registry) -> None:
        """A caller that has the answer may send the next request to this gateway at once.

        Others may have changed the registry since, so this is not waited for forever.
        """
        await self._served.until(lambda now: now == registry, timeout_s=SEEN_TIMEOUT_S)

    def _check_enabled(self) -> None:
        if not self._config.engine.enable_lora:
            raise RequestError(no_adapters(self._config.model_name), remedy=HOW_TO_ENABLE, code=DISABLED)
