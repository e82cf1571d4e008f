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
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.options import detect_device, serve_config
from cluster.cli.ray import open_ray, spec_of
from cluster.cli.startup import Startup
from cluster.config.checkpoint_location import resolve_model
from cluster.config.serve import API_KEY_ENV, DEFAULT_DEPLOYMENT, ServeConfig
from cluster.keys.keyring import Keyring
from cluster.system.net import check_port_is_free
from cluster.system.tasks import cancel_all, catch_signals
from cluster.system.tls import open_certificate
from cluster.terminal.phases import Console
from cluster.text.load import load_text

if TYPE_CHECKING:
    from cluster.gateway.gateway import Gateway
    from cluster.ray_runtime.session import RayCluster
    from cluster.text.chat.template import ChatTemplate
    from cluster.text.tokenizer import Tokenizer

    Text = Future[tuple[Tokenizer, ChatTemplate | None]]

log = logging.getLogger(__name__)


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
        text = pool.submit(
            load_text,
            Path(config.engine.model_path),
            chat_template=config.chat_template,
            model_vocab_size=config.engine.model.vocab_size,
        )
        with open_ray(console, config) as cluster:
            if config.ray_address and args.device == "auto" and cluster.num_gpus() >= args.tensor_parallel_size:
                config = serve_config(args, folder, model_name, device="cuda")
            asyncio.run(_run(config, console, text, cluster))


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
    from cluster.controller.client import ControllerClient
    from cluster.gateway.actor import start_gateways, stop_gateways, urls_of
    from cluster.gateway.gateway import Gateway
    from cluster.ray_runtime.metrics import publish_forever

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


def _goes_on(config: ServeConfig) -> str:
    name = "" if config.deployment == DEFAULT_DEPLOYMENT else f" --name {config.deployment}"
    return (
        f"Stopped. The replicas go on in Ray at {config.ray_address}: `tramontane serve` finds them, "
        f"`tramontane down --ray-address {config.ray_address}{name}` ends them."
    )


def _banner(config: ServeConfig, urls: list[str], cluster: "RayCluster", elapsed_s: float) -> str:
    from cluster.ray_runtime.session import token_path

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
