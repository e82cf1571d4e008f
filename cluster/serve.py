"""`tramontane serve`: brings Ray, the controller, and a gateway up in order, and down again in the opposite one.

Knows the order and what overlaps with what: Ray starts in the main thread while another reads the tokenizer. Knows no endpoint
and no engine. A Ray of our own ends with the command, whatever ends it, and no process and no file is left; in a Ray that was
joined, the controller and its replicas go on, and the next `serve` finds them.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import API_KEY_ENV, DEFAULT_DEPLOYMENT, ServeConfig, check_port_is_free, detect_device, serve_config
from cluster.console import Console
from cluster.keys.keyring import Keyring
from cluster.models import resolve_model
from cluster.startup import Startup
from cluster.text.load import load_text
from cluster.tls import open_certificate

if TYPE_CHECKING:
    from cluster.gateway import Gateway
    from cluster.replicas.ray_cluster import RayCluster
    from cluster.replicas.state import ClusterSpec
    from cluster.text.chat import ChatTemplate
    from cluster.text.tokenizer import Tokenizer

    Text = Future[tuple[Tokenizer, ChatTemplate | None]]

log = logging.getLogger(__name__)

OWN_CLUSTER_PLACEMENT_TIMEOUT_S = 10.0  # nothing will be added to it: what is not free soon never will be


def serve(args: Namespace) -> None:
    """Returns when stopped by SIGINT or SIGTERM. Raises TramontaneError with a sentence for the user."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # until the event loop takes both
    console = Console()
    try:
        _serve(args, console)
    except (KeyboardInterrupt, SystemExit):  # the latter from the SIGTERM handler that ray.init installs
        console.line("Stopped.")


def _serve(args: Namespace, console: Console) -> None:
    folder, model_name = resolve_model(args.model, revision=args.revision)
    if args.ray_address is None:
        device = detect_device(args.device)
    else:  # the cluster's nodes decide, once it is joined
        device = "cpu" if args.device == "auto" else args.device
    config = serve_config(args, folder, model_name, device=device)
    # Before the minutes of start-up are spent.
    Keyring(None if config.api_keys is None else Path(config.api_keys))
    open_certificate(config.tls_cert, config.tls_key)
    check_port_is_free(config.host, config.port, shared=config.num_gateways > 1)
    with ThreadPoolExecutor(1, thread_name_prefix="text") as pool:
        text = pool.submit(load_text, config)
        with open_ray(console, config) as cluster:
            if config.ray_address and args.device == "auto" and cluster.num_gpus() >= args.tensor_parallel_size:
                config = serve_config(args, folder, model_name, device="cuda")
            asyncio.run(_run(config, console, text, cluster))


def _headline(config: ServeConfig) -> str:
    engine = config.engine
    ranks = f"{engine.tensor_parallel_size} tensor-parallel rank{'s' * (engine.tensor_parallel_size > 1)}"
    low, high = config.min_replicas, config.max_replicas
    replicas = "" if (low, high) == (1, 1) else f"{high if low == high else f'{low} to {high}'} replicas of "
    return (
        f"Tramontane {version('tramontane')}: {config.model_name}, {engine.dtype}, {replicas}{ranks} on {engine.device}"
    )


@contextmanager
def open_ray(console: Console, config: ServeConfig) -> Iterator["RayCluster"]:
    console.line(_headline(config))
    with console.phase(f"Joining Ray at {config.ray_address}" if config.ray_address else "Starting Ray"):
        from cluster.replicas.ray_cluster import connect

        num_ranks = config.engine.tensor_parallel_size * config.max_replicas
        cluster = connect(config.ray_address, namespace=config.deployment, num_cpus=num_ranks)
    try:
        yield cluster
    finally:
        cluster.close()


def spec_of(config: ServeConfig, *, own_cluster: bool) -> "ClusterSpec":
    """What the controller is asked for."""
    from cluster.replicas.state import ClusterSpec

    engine = config.engine
    if own_cluster and engine.device == "cpu" and engine.num_threads is None:
        # All replicas share this machine: without this each would take all of its cores.
        num_ranks = engine.tensor_parallel_size * config.max_replicas
        engine = replace(engine, num_threads=max(1, (os.cpu_count() or 1) // num_ranks))
    return ClusterSpec(
        model_name=config.model_name,
        engine=engine,
        min_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        num_gateways=config.num_gateways,
        drain_timeout_s=config.drain_timeout_s,
        scale_down_after_s=config.scale_down_after_s,
        ttft_objective_s=config.ttft_objective_s,
        placement_timeout_s=OWN_CLUSTER_PLACEMENT_TIMEOUT_S if own_cluster else None,
        single_host=own_cluster,
        preemption_notices=config.preemption_notices,
        log_level=config.log_level.upper(),
    )


async def _run(config: ServeConfig, console: Console, text: "Text", cluster: "RayCluster") -> None:
    stop, stop_now = catch_signals()
    async with contextlib.AsyncExitStack() as stack:
        startup = Startup(console, num_ranks=config.engine.tensor_parallel_size)
        starting = asyncio.create_task(_start(config, text, cluster, startup, stack, stop_now))
        stopping = asyncio.create_task(stop.wait())
        stack.push_async_callback(cancel_all, starting, stopping)
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        startup.end()
        if starting.done():
            gateway, urls, drain_others = starting.result()
            console.line(_banner(config, urls, cluster, console.elapsed_s))
            await _until_stopped(stop, gateway)
            grace_s = config.drain_timeout_s
            console.line(f"Stopping: running requests have {grace_s:g} s to finish (Ctrl-C again: at once).")
            await asyncio.gather(gateway.drain(grace_s, stop_now), drain_others())
        else:
            console.line("Stopping.")
    console.line("Stopped." if cluster.is_ours else _goes_on(config))


async def _start(
    config: ServeConfig,
    text: "Text",
    cluster: "RayCluster",
    startup: Startup,
    stack: contextlib.AsyncExitStack,
    stop_now: asyncio.Event,
) -> tuple["Gateway", list[str], Callable[[], Awaitable[None]]]:
    """Returns when a request would be served: this gateway, all urls, and what drains the others. `stack` closes what was opened."""
    from cluster.gateway import Gateway
    from cluster.replicas.controller_client import ControllerClient
    from cluster.replicas.gateway_actor import start_gateways, stop_gateways, urls_of
    from cluster.replicas.ray_metrics import publish_forever

    controller = ControllerClient(config.deployment)
    if cluster.is_ours:
        stack.push_async_callback(controller.stop_replicas)
    await controller.start(spec_of(config, own_cluster=cluster.is_ours))
    tokenizer, chat_template = await asyncio.wrap_future(text)
    gateway = Gateway(config, controller, tokenizer=tokenizer, chat_template=chat_template, on_view=startup.take)
    stack.push_async_callback(gateway.close)
    await gateway.open()
    gateway.spawn(asyncio.create_task(publish_forever(gateway.metrics.registry)))
    others = await start_gateways(config)
    drain_others = partial(stop_gateways, others, config.drain_timeout_s + 5, stop_now)
    stack.push_async_callback(drain_others)
    await startup.until_ready(gateway.router.health)
    return gateway, [gateway.url, *await urls_of(others)], drain_others


async def _until_stopped(stop: asyncio.Event, gateway: "Gateway") -> None:
    """Raises what ended the gateway's own work, if that came first."""
    stopping, working = asyncio.create_task(stop.wait()), asyncio.create_task(gateway.work())
    try:
        await asyncio.wait([stopping, working], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        await cancel_all(stopping, working)


async def cancel_all(*tasks: "asyncio.Task[object]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def catch_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first and the second SIGINT or SIGTERM."""
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop, stop_now


def _goes_on(config: ServeConfig) -> str:
    name = "" if config.deployment == DEFAULT_DEPLOYMENT else f" --name {config.deployment}"
    return (
        f"Stopped. The replicas go on in Ray at {config.ray_address}: `tramontane serve` finds them, "
        f"`tramontane down --ray-address {config.ray_address}{name}` ends them."
    )


def _banner(config: ServeConfig, urls: list[str], cluster: "RayCluster", elapsed_s: float) -> str:
    from cluster.replicas.ray_cluster import token_path

    url, *others = urls
    body = json.dumps({"model": config.model_name, "prompt": "def fibonacci(n):", "max_tokens": 64})
    # The key itself is never printed; where the environment holds it, the line works as pasted.
    is_there = config.api_key is not None and os.environ.get(API_KEY_ENV) == config.api_key
    key = f' -H "Authorization: Bearer {f"${API_KEY_ENV}" if is_there else "YOUR_KEY"}"' if config.has_keys else ""
    lines = [
        "",
        f"Ready in {elapsed_s:.1f} s.",
        f"  Endpoint   {url}/v1",
        *(f"             {other}/v1" for other in others),
        f"  Try        curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        f"  Open       {url}/ in a browser: playground and live cluster view; {url}/docs",
        f"  Watch      tramontane status --url {url}",
    ]
    if cluster.dashboard_url:
        path = token_path()
        lines.append(f"  Dashboard  {cluster.dashboard_url}" + (f" (its token is in {path})" if path else ""))
    return "\n".join([*lines, "  Stop       Ctrl-C", ""])
