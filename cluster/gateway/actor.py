"""An additional gateway as a Ray actor, on another node if there is one. Its event loop runs in a thread of its own.

Knows Ray and `cluster.gateway.gateway`. `serve --gateways N` starts it; Ray restarts it when it dies, and it outlives the command.
"""

import asyncio
import contextlib
import logging
import re
import threading
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.cluster import ClusterConfig
from cluster.config.serve import ServeConfig
from cluster.system.garbage import collect_garbage_rarely
from cluster.system.log import setup_logging
from cluster.system.malloc import return_large_blocks
from cluster.system.net import is_loopback
from cluster.text.load import LoadedText, load_text
from workers.errors import ReplicaUnavailableError, TramontaneError

log = logging.getLogger(__name__)

GATEWAY_NAME = "tramontane-gateway-{}"
FIND_TIMEOUT_S = 5.0


class GatewayActor:
    """Opens the gateway at once; `url` waits until it is open, and raises the error if that failed."""

    def __init__(self, config: ClusterConfig) -> None:
        server = config.server
        setup_logging(server.log_level, format=server.log_format, prompts=server.log_prompts)
        return_large_blocks()
        self._config = config
        self._opened = threading.Event()
        self._url = ""
        self._failure: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()

    def url(self) -> str:
        """Its address. Raises TramontaneError."""
        self._opened.wait()
        if self._failure is not None:
            raise self._failure
        return self._url

    def serves(self, config: ClusterConfig) -> bool:
        """Whether it serves, or is about to serve, this configuration."""
        return self._failure is None and config == self._config

    def stop(self) -> None:
        """Lets running requests finish, up to the configured drain timeout, and ends."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as e:  # `url` raises it
            log.exception("The gateway failed: %s", e)
            self._failure = e
            self._opened.set()

    async def _serve(self) -> None:
        from cluster.controller.client import ControllerClient
        from cluster.gateway.deployment import Part
        from cluster.gateway.gateway import Gateway
        from cluster.ray_runtime.metrics import publish_forever

        parts = [
            Part(config=config, controller=ControllerClient(config.deployment), text=_text_of(config))
            for config in self._config.deployments
        ]
        gateway = Gateway(parts)
        try:
            await gateway.open()
            gateway.spawn(asyncio.create_task(publish_forever(gateway.metrics.registry)))
            collect_garbage_rarely()
            self._url = gateway.url
            self._opened.set()
            await self._stop.wait()
            await gateway.drain(self._config.server.drain_timeout_s)
        finally:
            await gateway.close()


def _text_of(config: ServeConfig) -> LoadedText:
    engine = config.engine
    return load_text(
        Path(engine.model_path), chat_template=config.chat_template, model_vocab_size=engine.model.vocab_size
    )


async def start_gateways(config: ClusterConfig) -> list[ActorHandle]:
    """The gateways in addition to the caller's own: spread over the nodes, or on this node if only this machine is served.

    Gateways left by an earlier command are kept if they serve the same configuration, and replaced if not.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    strategy = here if is_loopback(config.server.host) else "SPREAD"
    names = [GATEWAY_NAME.format(i) for i in range(1, config.server.num_gateways)]
    kept = dict(zip(names, await asyncio.gather(*(_find(name, config) for name in names)), strict=True))
    return [
        kept[name]
        or ray.remote(GatewayActor)
        .options(
            name=name,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=0,
            scheduling_strategy=strategy,
        )
        .remote(config)
        for name in names
    ]


async def _find(name: str, config: ClusterConfig) -> ActorHandle | None:
    """The gateway of this name if it serves `config`. A gateway that serves another configuration is ended."""
    try:
        actor = await asyncio.to_thread(ray.get_actor, name)
    except ValueError:
        return None
    with contextlib.suppress(RayError, TimeoutError):
        async with asyncio.timeout(FIND_TIMEOUT_S):
            if await actor.serves.remote(config):
                return actor
    log.warning("Gateway %s was left by an earlier command with another configuration and is replaced.", name)
    ray.kill(actor)
    with contextlib.suppress(ValueError):
        while await asyncio.to_thread(ray.get_actor, name):  # until its name is free
            await asyncio.sleep(0.05)
    return None


async def urls_of(actors: list[ActorHandle]) -> list[str]:
    """Their addresses. Raises the error of the first that failed, such as ConfigError for a port in use."""
    try:
        return list(await asyncio.gather(*(a.url.remote() for a in actors)))
    except RayTaskError as e:
        if isinstance(e.cause, TramontaneError):
            raise e.cause from None
        raise ReplicaUnavailableError(f"An additional gateway could not start: {e.cause!r}.") from e
    except RayError as e:
        raise ReplicaUnavailableError(f"An additional gateway died during its start: {type(e).__name__}.") from e


async def stop_gateways(actors: list[ActorHandle], timeout_s: float, stop_now: asyncio.Event) -> None:
    """Drains and ends them; ends them at once when `stop_now` is set. Idempotent."""
    drained = asyncio.gather(*(a.stop.remote() for a in actors), return_exceptions=True)
    hurry = asyncio.create_task(stop_now.wait())
    either: list[asyncio.Future[Any]] = [drained, hurry]
    await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()
    hurry.cancel()
    await asyncio.gather(drained, hurry, return_exceptions=True)
    for actor in actors:
        ray.kill(actor)


def remove_gateways() -> None:
    """Ends the gateways of this deployment at once, on every node."""
    for name in list_named_actors():
        if re.fullmatch(GATEWAY_NAME.format(r"\d+"), name):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name))
