"""`tramontane serve`: starts Ray, the controller and a gateway in this order, and stops them in the opposite one.

Knows the order: everything that can be wrong with the options and the checkpoint is found before Ray starts. Knows no endpoint and no
engine. A Ray cluster that this command started ends with it, however it ends, and leaves no process and no file. In a cluster that it
joined, the controller and its replicas keep running, and the next `serve` finds them.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
from argparse import Namespace
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.adapters.start import check_adapters, load_adapters
from cluster.cli.device import before_ray
from cluster.cli.options.profile_rows import profile_file
from cluster.cli.options.settings import serve_config
from cluster.cli.profile import start_profile
from cluster.cli.ray import open_ray, spec_of
from cluster.cli.startup import Startup
from cluster.config.checkpoint_check import check_checkpoint
from cluster.config.checkpoint_location import resolve_model
from cluster.config.dtype import Cpus, this_machine
from cluster.config.engine import Device
from cluster.config.sampling_defaults import NO_DEFAULTS
from cluster.config.serve import API_KEY_ENV, DEFAULT_DEPLOYMENT, ServeConfig
from cluster.keys.keyring import Keyring
from cluster.profile.file import ProfileFile
from cluster.system.data_dir import DataDir
from cluster.system.malloc import return_large_blocks
from cluster.system.net import check_port_is_free
from cluster.system.tasks import cancel_all, catch_signals
from cluster.system.tls import open_certificate
from cluster.terminal.phases import Console
from cluster.text.load import load_text
from workers.config import describe_dtype

if TYPE_CHECKING:
    from cluster.gateway.gateway import Gateway
    from cluster.ray_runtime.session import RayCluster
    from cluster.text.load import LoadedText
    from workers.protocol import EngineFacts

log = logging.getLogger(__name__)


def serve(args: Namespace) -> None:
    """Returns when stopped by SIGINT or SIGTERM. Raises TramontaneError with the message for the user."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # until the event loop handles both
    console = Console()
    try:
        _serve(args, console)
    except (KeyboardInterrupt, SystemExit):  # the latter from the SIGTERM handler that ray.init installs
        console.line("Stopped.")


def _serve(args: Namespace, console: Console) -> None:
    return_large_blocks()
    folder, model_name = resolve_model(args.model, revision=args.revision, gguf_file=args.gguf_file)
    device = before_ray(args.device, ray_address=args.ray_address, num_gpus=args.tensor_parallel_size)

    def configure(device: Device, cpus: Cpus = this_machine) -> ServeConfig:
        return serve_config(args, folder, model_name, device=device, cpus=cpus)

    config = configure(device.device)
    # Before the start-up, which takes minutes.
    profile = profile_file(args)
    Keyring(None if config.api_keys is None else Path(config.api_keys))
    open_certificate(config.tls_cert, config.tls_key)
    check_port_is_free(config.host, config.port, shared=config.num_gateways > 1)
    if config.data_dir is not None:
        DataDir(Path(config.data_dir), model_name=config.model_name).close()
    check_checkpoint(folder, chat_template=config.chat_template)
    check_adapters(config)
    text = load_text(folder, chat_template=config.chat_template, model_vocab_size=config.engine.model.vocab_size)
    with open_ray(console, config, device, requested=args.device, configure=configure) as (cluster, config):
        asyncio.run(_run(config, console, text, cluster, profile=profile))


async def _run(
    config: ServeConfig,
    console: Console,
    text: "LoadedText",
    cluster: "RayCluster",
    *,
    profile: ProfileFile | None,
) -> None:
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
            finish_profile = await start_profile(profile, gateway, console=console, stack=stack, stop_now=stop_now)
            engine = engine_line(None if gateway.view is None else gateway.view.facts)
            chat = text.choice if text.chat_template is not None else f"WARNING: {text.choice}"
            banner = _banner(
                config,
                urls,
                cluster,
                console.elapsed_s,
                engine=engine,
                tokenizer=text.tokenizer.description,
                chat=chat,
                profile=profile,
            )
            console.line(banner)
            await _until_stopped(stop, gateway)
            grace_s = config.drain_timeout_s
            console.line(
                f"Stopping. Running requests have {grace_s:g} s to finish; press Ctrl-C again to stop at once."
            )
            await asyncio.gather(gateway.drain(grace_s, stop_now), drain_others(), finish_profile())
        else:
            console.line("Stopping.")
    console.line("Stopped." if cluster.is_ours else _keeps_running(config))


async def _start(
    config: ServeConfig,
    text: "LoadedText",
    cluster: "RayCluster",
    startup: Startup,
    stack: contextlib.AsyncExitStack,
    stop_now: asyncio.Event,
) -> tuple["Gateway", list[str], Callable[[], Awaitable[None]]]:
    """Returns once requests are served: this gateway, the URLs of all gateways, and a function that drains the other ones.

    What it opens is closed by `stack`.
    """
    from cluster.controller.client import ControllerClient
    from cluster.gateway.actor import start_gateways, stop_gateways, urls_of
    from cluster.gateway.gateway import Gateway
    from cluster.ray_runtime.metrics import publish_forever

    controller = ControllerClient(config.deployment)
    if cluster.is_ours:
        stack.push_async_callback(controller.stop_replicas)
    await controller.start(spec_of(config, own_cluster=cluster.is_ours))
    gateway = Gateway(config, controller, text=text, on_view=startup.handle, links=_links(cluster))
    stack.push_async_callback(gateway.close)
    await gateway.open()
    gateway.spawn(asyncio.create_task(publish_forever(gateway.metrics.registry)))
    loading = asyncio.create_task(load_adapters(config, gateway))
    stack.push_async_callback(cancel_all, loading)
    others = await start_gateways(config)
    drain_others = partial(stop_gateways, others, config.drain_timeout_s + 5, stop_now)
    stack.push_async_callback(drain_others)
    await startup.until_ready(gateway.router.health)
    await loading
    return gateway, [gateway.url, *await urls_of(others)], drain_others


def _links(cluster: "RayCluster") -> dict[str, str]:
    """Where else an operator looks: Ray's dashboard, and Grafana where Ray has been told of it."""
    grafana = os.environ.get("RAY_GRAFANA_IFRAME_HOST") or os.environ.get("RAY_GRAFANA_HOST")
    links = {"Ray's dashboard": cluster.dashboard_url} if cluster.dashboard_url else {}
    return links | ({"Grafana": f"{grafana.rstrip('/')}/d/tramontane"} if grafana else {})


async def _until_stopped(stop: asyncio.Event, gateway: "Gateway") -> None:
    """Returns on a signal. If the gateway's own work ends before that, raises its exception."""
    stopping, working = asyncio.create_task(stop.wait()), asyncio.create_task(gateway.work())
    try:
        await asyncio.wait([stopping, working], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        await cancel_all(stopping, working)


def _keeps_running(config: ServeConfig) -> str:
    name = "" if config.deployment == DEFAULT_DEPLOYMENT else f" --name {config.deployment}"
    return (
        f"Stopped. The replicas keep running on Ray at {config.ray_address}. `tramontane serve` uses them again; "
        f"`tramontane down --ray-address {config.ray_address}{name}` stops them."
    )


def engine_line(facts: "EngineFacts | None") -> str:
    """The sizes that the first replica runs with; "unknown" until one has reported."""
    if facts is None:
        return "unknown until a replica runs"
    numbers = f"{describe_dtype(facts.dtype, facts.quantization)}; " if facts.dtype else ""
    return (
        f"{facts.device or 'unknown device'}: up to {facts.max_num_seqs:,} sequences and {facts.max_num_batched_tokens:,} tokens a step, "
        f"{facts.max_background_tokens:,} of these for batches; {facts.num_blocks:,} KV blocks of {facts.block_size} tokens"
        f"{_kv_form(facts)}; {numbers}attention {facts.attention_backend}"
    )


def _kv_form(facts: "EngineFacts") -> str:
    """ " in int8, 66 KiB per token and rank": what --kv-cache-dtype changes."""
    form = "" if facts.kv_cache_dtype == "auto" else f" in {facts.kv_cache_dtype}"
    ranks = "" if facts.tensor_parallel_size == 1 else " and rank"
    return f"{form}, {facts.kv_token_bytes / 1024:.3g} KiB per token{ranks}" if facts.kv_token_bytes else form


def sampling_line(config: ServeConfig) -> str:
    """What the model's makers chose for requests that leave it out, and from where; "" if nothing."""
    if config.sampling_defaults == NO_DEFAULTS:
        return ""
    own = "the GGUF file" if config.engine.model_path.endswith(".gguf") else "the checkpoint's generation_config.json"
    where = own if config.generation_config == "auto" else f"{config.generation_config}/generation_config.json"
    return f"{config.sampling_defaults} where a request says nothing, from {where}"


def _banner(
    config: ServeConfig,
    urls: list[str],
    cluster: "RayCluster",
    elapsed_s: float,
    *,
    engine: str,
    tokenizer: str,
    chat: str,
    profile: ProfileFile | None,
) -> str:
    """engine: see `engine_line`. tokenizer: its kind and its file. chat: the chat template and why it is used, or why there is none."""
    from cluster.ray_runtime.session import token_path

    url, *others = urls
    body = json.dumps({"model": config.model_name, "prompt": "def fibonacci(n):", "max_tokens": 64})
    # The key itself is never printed. Where the environment holds it, the command can be pasted as it is.
    is_in_environment = config.api_key is not None and os.environ.get(API_KEY_ENV) == config.api_key
    key = (
        f' -H "Authorization: Bearer {f"${API_KEY_ENV}" if is_in_environment else "YOUR_KEY"}"'
        if config.has_keys
        else ""
    )
    lines = [
        "",
        f"Ready in {elapsed_s:.1f} s.",
        f"  Endpoint   {url}/v1",
        *(f"             {other}/v1" for other in others),
        f"  Engine     {engine}",
        *([f"  Platform   {config.platform}"] if config.platform is not None else []),
        *(
            ["  Images     not read: the checkpoint's encoder of images is left out"]
            if config.engine.model.has_vision
            else []
        ),
        *([f"  Adapters   {adapters}"] if (adapters := ", ".join(name for name, _ in config.lora)) else []),
        f"  Tokenizer  {tokenizer}",
        f"  Template   {chat}",
        *([f"  Sampling   {sampling}"] if (sampling := sampling_line(config)) else []),
        f"  Try        curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        f"  Open       {url}/ in a browser for the playground and a live view of the cluster; {url}/docs for the API",
        f"  Watch      tramontane status --url {url}",
    ]
    if profile is not None:
        lines.append(
            f"  Profile    the next {profile.num_steps} steps with requests are recorded and written to {profile.path}"
        )
    if cluster.dashboard_url:
        path = token_path()
        lines.append(f"  Dashboard  {cluster.dashboard_url}" + (f" (its token is in {path})" if path else ""))
    return "\n".join([*lines, "  Stop       Ctrl-C", ""])
