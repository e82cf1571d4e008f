"""`tramontane serve`: starts Ray, the controllers and a gateway in this order, and stops them in the opposite one.

Knows the order: everything that can be wrong with the options and the checkpoints is found before Ray starts. Knows no endpoint and no
engine. A Ray cluster that this command started ends with it, however it ends, and leaves no process and no file. In a cluster that it
joined, the controllers and their replicas keep running, and the next `serve` finds them.
"""

import asyncio
import contextlib
import logging
import os
import signal
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.adapters.start import load_adapters
from cluster.cli.launch.ray import Planned, open_ray_for, spec_of
from cluster.cli.launch.startup import Startup, all_ready
from cluster.cli.options.rows.profile import profile_file
from cluster.cli.serve.banner import Ready, banner
from cluster.cli.serve.models import cluster_config, models_of
from cluster.cli.serve.profile import start_profile
from cluster.config.cluster import ClusterConfig
from cluster.config.serve import DEFAULT_DEPLOYMENT, ServeConfig
from cluster.keys.keyring import Keyring
from cluster.profile.file import ProfileFile
from cluster.protocol.names import member_of, server_of
from cluster.system.data_dir import DataDir
from cluster.system.garbage import collect_garbage_rarely
from cluster.system.log import setup_logging
from cluster.system.malloc import return_large_blocks
from cluster.system.net import check_port_is_free
from cluster.system.tasks import cancel_all, catch_signals
from cluster.system.tls import open_certificate
from cluster.terminal.phases import Console

if TYPE_CHECKING:
    from cluster.controller.client import ControllerClient
    from cluster.gateway.gateway import Gateway
    from cluster.ray_runtime.session import RayCluster
    from cluster.text.load import LoadedText

log = logging.getLogger(__name__)

DASHBOARD_TIMEOUT_S = 5.0  # it is usually up before the first replica


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
    models = models_of(args)
    config = cluster_config(models, [model.configure(model.device.device) for model in models])
    server = config.server
    if args.config is not None:  # it may say how to log
        setup_logging(server.log_level, format=server.log_format, prompts=server.log_prompts)
    # Before the start-up, which takes minutes.
    profile = profile_file(models[0].args)
    _check_server(config)
    for model, one in zip(models, config.deployments, strict=True):
        model.check(one)
    texts = [model.text(one) for model, one in zip(models, config.deployments, strict=True)]
    planned = [
        Planned(config=one, device=model.device, requested=model.requested, configure=model.configure)
        for model, one in zip(models, config.deployments, strict=True)
    ]
    with open_ray_for(console, planned) as (cluster, configs):
        asyncio.run(_run(ClusterConfig(configs), console, texts, cluster, profile=profile))


def _check_server(config: ClusterConfig) -> None:
    """Raises ConfigError for what the gateway could not use."""
    server = config.server
    Keyring(None if server.api_keys is None else Path(server.api_keys))
    open_certificate(server.tls_cert, server.tls_key)
    check_port_is_free(server.host, server.port, shared=server.num_gateways > 1)
    if server.data_dir is not None:
        DataDir(Path(server.data_dir), model_name=config.claim).close()


async def _run(
    config: ClusterConfig,
    console: Console,
    texts: Sequence["LoadedText"],
    cluster: "RayCluster",
    *,
    profile: ProfileFile | None,
) -> None:
    stop, stop_now = catch_signals()
    async with contextlib.AsyncExitStack() as stack:
        startups = _startups(config, console)
        starting = asyncio.create_task(_start(config, texts, cluster, startups, stack, stop_now))
        stopping = asyncio.create_task(stop.wait())
        stack.push_async_callback(cancel_all, starting, stopping)
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        for startup in startups:
            startup.end()
        if starting.done():
            gateway, urls, drain_others = starting.result()
            finish_profile = await start_profile(profile, gateway, console=console, stack=stack, stop_now=stop_now)
            views = [deployment.view for deployment in gateway.deployments]
            ready = Ready(
                urls=urls,
                elapsed_s=console.elapsed_s,
                facts=[None if view is None else view.facts for view in views],
                texts=texts,
                dashboard_url=cluster.dashboard_url,
                token_path=_token_path(),
                profile=profile,
            )
            collect_garbage_rarely()
            console.line(banner(config, ready))
            _warn_of_others(config, console)
            await _until_stopped(stop, gateway)
            grace_s = config.server.drain_timeout_s
            console.line(
                f"Stopping. Running requests have {grace_s:g} s to finish; press Ctrl-C again to stop at once."
            )
            await asyncio.gather(gateway.drain(grace_s, stop_now), drain_others(), finish_profile())
        else:
            console.line("Stopping.")
    console.line("Stopped." if cluster.is_ours else _keeps_running(config.server))


def _startups(config: ClusterConfig, console: Console) -> list[Startup]:
    """One for each deployment. Their phases are shown one after the other, whatever happens at the same time."""
    made: list[Startup] = []
    for one in config.deployments:
        title = one.model_name if len(config.deployments) > 1 else None
        made.append(Startup(console, num_ranks=one.engine.tensor_parallel_size, title=title, after=made))
    return made


async def _start(
    config: ClusterConfig,
    texts: Sequence["LoadedText"],
    cluster: "RayCluster",
    startups: Sequence[Startup],
    stack: contextlib.AsyncExitStack,
    stop_now: asyncio.Event,
) -> tuple["Gateway", list[str], Callable[[], Awaitable[None]]]:
    """Returns once requests are served: this gateway, the URLs of all gateways, and a function that drains the other ones.

    What it opens is closed by `stack`.
    """
    from cluster.controller.client import ControllerClient
    from cluster.gateway.actor import start_gateways, stop_gateways, urls_of
    from cluster.gateway.deployment import Part
    from cluster.gateway.gateway import Gateway
    from cluster.ray_runtime.metrics import publish_forever

    server = config.server
    controllers = [ControllerClient(one.deployment) for one in config.deployments]
    if cluster.is_ours:
        stack.push_async_callback(_stop_replicas, controllers)
    specs = [spec_of(one, own_cluster=cluster.is_ours, num_ranks=config.num_ranks) for one in config.deployments]
    await asyncio.gather(*(c.start(spec) for c, spec in zip(controllers, specs, strict=True)))
    links = _links(cluster)
    parts = [
        Part(config=one, controller=controller, text=text, on_view=startup.handle)
        for one, controller, text, startup in zip(config.deployments, controllers, texts, startups, strict=True)
    ]
    gateway = Gateway(parts, links=links)
    stack.push_async_callback(gateway.close)
    await gateway.open()
    gateway.spawn(asyncio.create_task(publish_forever(gateway.metrics.registry)))
    loading = [asyncio.create_task(load_adapters(d.config, d.adapters)) for d in gateway.deployments]
    stack.push_async_callback(cancel_all, *loading)
    others = await start_gateways(config)
    drain_others = partial(stop_gateways, others, server.drain_timeout_s + 5, stop_now)
    stack.push_async_callback(drain_others)
    await all_ready([(s, d.router.health) for s, d in zip(startups, gateway.deployments, strict=True)])
    await asyncio.to_thread(cluster.find_dashboard, DASHBOARD_TIMEOUT_S)
    links |= _links(cluster)
    await asyncio.gather(*loading)
    return gateway, [gateway.url, *await urls_of(others)], drain_others


async def _stop_replicas(controllers: Sequence["ControllerClient"]) -> None:
    await asyncio.gather(*(controller.stop_replicas() for controller in controllers))


def _links(cluster: "RayCluster") -> dict[str, str]:
    """Where else an operator looks: Ray's dashboard, and Grafana where Ray has been told of it."""
    grafana = os.environ.get("RAY_GRAFANA_IFRAME_HOST") or os.environ.get("RAY_GRAFANA_HOST")
    links = {"Ray's dashboard": cluster.dashboard_url} if cluster.dashboard_url else {}
    return links | ({"Grafana": f"{grafana.rstrip('/')}/d/tramontane"} if grafana else {})


def _token_path() -> Path | None:
    from cluster.ray_runtime.session import token_path

    return token_path()


def _warn_of_others(config: ClusterConfig, console: Console) -> None:
    """Deployments of this name that an earlier command left in a cluster that was joined: nobody asked for them now."""
    from cluster.controller.client import running_deployments

    server = server_of(config.server.deployment)
    left = set(running_deployments(server)) - {one.deployment for one in config.deployments}
    for name in sorted(left):
        what = f"The deployment {member_of(name)!r}" if member_of(name) else "A deployment without a name of its own"
        console.line(
            f"  {what} of an earlier command still runs and is not served here; "
            f"`tramontane down --ray-address {config.server.ray_address} --name {name}` stops "
            f"{'it' if member_of(name) else 'all of them'}."
        )


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
    server = server_of(config.deployment)
    name = "" if server == DEFAULT_DEPLOYMENT else f" --name {server}"
    return (
        f"Stopped. The replicas keep running on Ray at {config.ray_address}. `tramontane serve` uses them again; "
        f"`tramontane down --ray-address {config.ray_address}{name}` stops them."
    )
