"""`tramontane batch` without a server: a gateway without HTTP in this process, on a new Ray or on a running one (--ray-address).

Knows the order: first the lines go into the store next to the output, then Ray and the replicas start while the lines are checked. On a
running Ray the batch is a deployment of its own, which is removed at the end. Knows no line and no answer.
"""

import asyncio
import contextlib
import math
import signal
from argparse import Namespace
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.api.app import make_app
from cluster.api.context import CONTEXT
from cluster.api.line_executor import ApiLineExecutor
from cluster.batch.files import FileContents
from cluster.batch.records import BatchRecord
from cluster.batch.run.runner import run_batch
from cluster.batch.store.interface import Store
from cluster.cli.batch import local_batch
from cluster.cli.batch.job import Job, JobFolder
from cluster.cli.batch.progress import Display
from cluster.cli.batch.steps import StoppedError
from cluster.cli.batch.watch import Watch
from cluster.cli.launch.device import before_ray
from cluster.cli.launch.ray import open_ray, spec_of
from cluster.cli.launch.startup import Startup
from cluster.cli.options.rows.shared import chat_template
from cluster.cli.options.settings import engine_config, serve_defaults
from cluster.config.checkpoint_check import check_checkpoint
from cluster.config.checkpoint_location import resolve_model
from cluster.config.dtype import Cpus, this_machine
from cluster.config.engine import Device
from cluster.config.sampling_defaults import generation_config, read_sampling_defaults
from cluster.config.serve import ServeConfig
from cluster.gateway.fleet import Fleet
from cluster.protocol.view import ClusterView
from cluster.router.router import Router
from cluster.system.tasks import cancel_all, catch_signals
from cluster.terminal.phases import Console
from cluster.text.load import load_text
from workers.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from cluster.ray_runtime.session import RayCluster
    from cluster.text.load import LoadedText

# Shorter than those of `serve`: no client waits for a batch.
SCALE_DOWN_AFTER_S = 60.0
DRAIN_TIMEOUT_S = 5.0


def run_here(folder: JobFolder, job: Job, options: Namespace, console: Console) -> Job:
    """Runs the job to its end, from wherever it is. The caller has the folder's lock.

    Raises TramontaneError with a message for the user.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # until the event loop handles both
    model_folder, model_name = resolve_model(
        job.request["model"], revision=job.request["revision"], gguf_file=job.request.get("gguf_file")
    )
    served_name = job.request["served_model_name"] or model_name
    with local_batch.opened(folder) as (store, files):
        try:
            batch = asyncio.run(local_batch.create(store, files, job, model=served_name))
        except (RequestError, ConfigError):  # nothing was started: the same command can run again once it is corrected
            folder.clear(keep_job=False)
            raise
        if batch.status in ("finalizing", "cancelling"):
            batch = asyncio.run(local_batch.write_files(store, files, batch))
        elif not batch.has_ended:
            device = before_ray(options.device, ray_address=options.ray_address, num_gpus=options.tensor_parallel_size)

            def configure(device: Device, cpus: Cpus = this_machine) -> ServeConfig:
                return batch_config(options, job, model_folder, served_name, device=device, cpus=cpus)

            config = configure(device.device)
            check_checkpoint(model_folder, chat_template=config.chat_template)
            text = load_text(
                model_folder, chat_template=config.chat_template, model_vocab_size=config.engine.model.vocab_size
            )
            with open_ray(console, config, device, requested=options.device, configure=configure) as (cluster, config):
                batch = asyncio.run(_answer(config, options, console, text, cluster, store, files, batch))
        return local_batch.deliver(folder, job, files, batch)


def batch_config(
    options: Namespace, job: Job, model_folder: Path, model_name: str, *, device: Device, cpus: Cpus = this_machine
) -> ServeConfig:
    """The configuration of this job's gateway. cpus: see `engine_config`. Raises ConfigError."""
    low, high = options.replicas or (0 if options.ray_address else 1, 1)
    if options.max_replicas is not None:
        low, high = min(low, options.max_replicas), options.max_replicas
    engine, dtype_reason = engine_config(options, model_folder, device=device, cpus=cpus)
    defaults_from = generation_config(job.request.get("generation_config", ServeConfig.generation_config))
    settings = serve_defaults() | {
        "engine": engine,
        "dtype_reason": dtype_reason,
        "model_name": model_name,
        "port": 0,
        "ray_address": options.ray_address,
        "deployment": job.deployment,
        "placement_timeout_s": math.inf,  # a batch waits for cheap nodes as long as it has to
        "min_replicas": low,
        "max_replicas": high,
        "scale_down_after_s": SCALE_DOWN_AFTER_S,
        "drain_timeout_s": DRAIN_TIMEOUT_S,
        "chat_template": chat_template(job.request["chat_template"]),
        "generation_config": defaults_from,
        "sampling_defaults": read_sampling_defaults(model_folder, defaults_from),
        "log_level": options.log_level,
    }
    return ServeConfig(**settings)


def _num_ranks(config: ServeConfig) -> int:
    return config.engine.tensor_parallel_size


async def _answer(
    config: ServeConfig,
    options: Namespace,
    console: Console,
    text: "LoadedText",
    cluster: "RayCluster",
    store: Store,
    files: FileContents,
    batch: BatchRecord,
) -> BatchRecord:
    """Runs the batch to its end. Raises StoppedError for a signal, and the reason when continuing is pointless."""
    from cluster.controller.client import ControllerClient
    from cluster.ray_runtime.metrics import publish_forever

    stop, _ = catch_signals()
    async with contextlib.AsyncExitStack() as stack:
        controller = ControllerClient(config.deployment)
        watch = Watch(store, batch.id, has_deadline=options.deadline is not None)

        async def remove_replicas() -> None:
            if not watch.ray_is_gone:  # otherwise the controller cannot answer
                await (controller.stop_replicas() if cluster.is_ours else controller.down())

        stack.push_async_callback(remove_replicas)
        await _unless(stop, controller.start(spec_of(config, own_cluster=cluster.is_ours)))
        startup = Startup(console, num_ranks=_num_ranks(config))
        stack.callback(startup.end)
        router = Router(policy=config.routing_policy)
        app = make_app(
            router=router,
            tokenizer=text.tokenizer,
            chat_template=text.chat_template,
            model_name=config.model_name,
            sampling_defaults=config.sampling_defaults,
        )

        def on_view(view: ClusterView) -> None:
            startup.handle(view)
            watch.on_view(view)

        fleet = Fleet(controller, router, gateway_id=config.deployment, url=config.deployment, on_view=on_view)
        stack.push_async_callback(fleet.close)
        background = [
            asyncio.create_task(fleet.run()),
            asyncio.create_task(publish_forever(app[CONTEXT].metrics.registry)),
            asyncio.create_task(watch.run(router)),
        ]
        stack.push_async_callback(cancel_all, *background)
        # Started now: the lines are checked while the replicas start.
        running = asyncio.create_task(run_batch(store, files, ApiLineExecutor(app[CONTEXT]), batch.id))
        stack.push_async_callback(cancel_all, running)
        starting = asyncio.create_task(startup.until_ready(router.health))
        stack.push_async_callback(cancel_all, starting)
        if await _first(stop, running, starting, watch.failed) is starting:
            starting.result()
            startup.end()
            display = Display(console)
            stack.callback(display.close)
            watch.display = display
            await _first(stop, running, watch.failed)
        if watch.failed.done():
            raise watch.failed.result()
        if not running.done():
            raise StoppedError("Stopped.")
        return running.result()


async def _first(stop: asyncio.Event, *tasks: "asyncio.Future[Any]") -> "asyncio.Future[Any] | None":
    """The first task that is done; None if `stop` is set before."""
    stopping = asyncio.create_task(stop.wait())
    try:
        either: list[asyncio.Future[Any]] = [stopping, *tasks]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_all(stopping)
    return next((task for task in tasks if task.done()), None)


async def _unless(stop: asyncio.Event, work: Coroutine[object, object, None]) -> None:
    task = asyncio.create_task(work)
    try:
        if await _first(stop, task) is None:
            raise StoppedError("Stopped.")
        task.result()
    finally:
        await cancel_all(task)
