"""The adapters that `serve --lora` starts with: found and checked before Ray starts, and loaded while the first replica does."""

import asyncio
from typing import TYPE_CHECKING

from cluster.adapters.registry import check_name
from cluster.config.adapter_location import resolve_adapter
from cluster.config.serve import ServeConfig
from workers.errors import CheckpointError, RequestError
from workers.lora.peft_folder import read_adapter

if TYPE_CHECKING:
    from cluster.gateway.adapters import GatewayAdapters


def check_adapters(config: ServeConfig) -> None:
    """Downloads those of the Hub. Raises ConfigError and CheckpointError for what cannot be loaded."""
    for name, source in config.lora:
        check_name(name)
        folder = resolve_adapter(source)
        try:
            read_adapter(folder, config.engine.model, max_rank=config.engine.max_lora_rank)
        except CheckpointError as e:
            raise CheckpointError(f"--lora {name}={source}: {e.message}", remedy=e.remedy) from e


async def load_adapters(config: ServeConfig, adapters: "GatewayAdapters") -> None:
    """Returns when all replicas have them. Raises CheckpointError for one that a replica cannot load."""
    loads = [adapters.load(name, source, in_place=True, while_starting=True) for name, source in config.lora]
    try:
        await asyncio.gather(*loads)
    except RequestError as e:
        raise CheckpointError(e.message, remedy=e.remedy) from e
