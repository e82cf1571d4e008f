"""`tramontane batch` without a server: a gateway without HTTP in this process, on a Ray of its own or on one that runs.

Knows the order: the lines come into the store beside the output first, then Ray and the replicas start while the lines are checked. In a
Ray that was joined the batch is a deployment of its own, which is taken down at the end. Knows no line and no answer.
"""

import asyncio
import contextlib
import logging
import signal
import time
from argparse import Namespace
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.api.app import make_app
from cluster.api.batch_lines import ApiLineExecutor
from cluster.api.context import GATEWAY
from cluster.batch.errors import BatchError
from cluster.batch.files import FileContents
from cluster.batch.records import BatchRecord, FileRecord, Line, LineResult, parse_window
from cluster.batch.run.executor import LineExecutor
from cluster.batch.run.runner import run_batch
from cluster.batch.store.interface import Store
from cluster.batch.store.open import open_files, open_store
from cluster.cli.batch.job import Job, JobFolder, Outcome
from cluster.cli.batch.progress import Display
from cluster.cli.batch.steps import Lines, StoppedError, conclude, refused
from cluster.cli.batch.watch import Watch
from cluster.cli.options import chat_template, detect_device, engine_config
from cluster.cli.ray import open_ray, spec_of
from cluster.cli.startup import Startup
from cluster.config.checkpoint_location import resolve_model
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
    from cluster.text.chat.template import ChatTemplate
    from cluster.text.tokenizer import Tokenizer

    Text = Future[tuple[Tokenizer, ChatTemplate | None]]

log = logging.getLogger(__name__)

NO_DEADLINE = "365d"  # the longest there is
SCALE_DOWN_AFTER_S = 60.0


def run_here(folder: JobFolder, job: Job, options: Namespace, console: Console) -> Job:
    """Brings the job to its end, from wherever it is; the caller holds the folder. Raises TramontaneError with a sentence for the user."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # until the event loop takes both
    model_folder, model_name = resolve_model(job.request["model"], revision=job.request["revision"])
    served_name = job.request["served_model_name"] or model_name
    store, files = open_store(folder.path), open_files(folder.path)
    try:
        try:
            batch = asyncio.run(_prepare(store, files, job, model=served_name))
        except (RequestError, ConfigError):  # nothing has begun: the same command can be given again, put right
            folder.clear(keep_job=False)
            raise
        if batch.status in ("finalizing", "cancelling"):  # of these, only the files are still to be made
            batch = asyncio.run(run_batch(store, files, _NoExecutor(), batch.id))
        elif not batch.has_ended:
            config = batch_config(options, job, model_folder, served_name)
            with ThreadPoolExecutor(1, thread_name_prefix="text") as pool:
                text = pool.submit(
                    load_text,
                    Path(config.engine.model_path),
                    chat_template=config.chat_template,
                    model_vocab_size=config.engine.model.vocab_size,
                )
                with open_ray(console, config) as cluster:
                    if config.ray_address and options.device == "auto" and cluster.num_gpus() >= _num_ranks(config):
                        options.device = "cuda"
                        config = batch_config(options, job, model_folder, served_name)
                    batch = asyncio.run(_answer(config, options, console, text, cluster, store, files, batch))
        return _conclude(folder, job, files, batch)
    finally:
        asyncio.run(store.close())


def end_here(folder: JobFolder, job: Job) -> Job:
    """Cancels the job of this machine that no process runs, and puts what was answered in its place. The caller holds the folder."""
    store, files = open_store(folder.path), open_files(folder.path)
    try:
        batch = asyncio.run(_end(store, files, job))
        return _conclude(folder, job, files, batch)
    finally:
        asyncio.run(store.close())


def ask_to_end(folder: JobFolder, job: Job) -> None:
    """Cancels the job that another process runs, which sees it within a second or two."""
    store = open_store(folder.path)
    try:
        if job.batch_id is None or asyncio.run(store.cancel_batch(job.batch_id, now=time.time())) is None:
            raise BatchError("The batch is only being prepared; end the process that does it with Ctrl-C.")
    finally:
        asyncio.run(store.close())


def look_here(folder: JobFolder, job: Job) -> BatchRecord | None:
    """The batch as it stands; None before it has begun."""
    if job.batch_id is None or not (folder.path / "batches.db").exists():
        return None
    store = open_store(folder.path)
    try:
        return asyncio.run(store.get_batch(job.batch_id))
    finally:
        asyncio.run(store.close())


def batch_config(options: Namespace, job: Job, model_folder: Path, model_name: str) -> ServeConfig:
    """What a gateway of this job is made of. Raises ConfigError."""
    if options.ray_address is None:
        device = detect_device(options.device)
    else:  # the cluster's nodes decide, once it is joined
        device = "cpu" if options.device == "auto" else options.device
    low, high = options.replicas or (0 if options.ray_address else 1, 1)
    if options.max_replicas is not None:
        low, high = min(low, options.max_replicas), options.max_replicas
    return ServeConfig(
        engine=engine_config(options, model_folder, device=device),
        model_name=model_name,
        host="127.0.0.1",
        port=0,
        api_key=None,
        ray_address=options.ray_address,
        deployment=job.deployment,
        min_replicas=low,
        max_replicas=high,
        num_gateways=1,
        routing_policy="prefix",
        max_queued_tokens=2_000_000,
        queue_timeout_s=300.0,
        ttft_objective_s=2.0,
        scale_down_after_s=SCALE_DOWN_AFTER_S,
        drain_timeout_s=5.0,
        chat_template=chat_template(job.request["chat_template"]),
        metrics_prefix="tramontane",
        log_level=options.log_level,
        log_format="text",
    )


def _num_ranks(config: ServeConfig) -> int:
    return config.engine.tensor_parallel_size


async def _prepare(store: Store, files: FileContents, job: Job, *, model: str) -> BatchRecord:
    """The batch in the store, made if it is not there yet."""
    assert job.batch_id is not None and job.input_file_id is not None, (
        "a job of this machine names both from the beginning"
    )
    if (batch := await store.get_batch(job.batch_id)) is not None:
        return batch
    lines, now = Lines(job, model=model), int(time.time())
    num_bytes = await files.write(job.input_file_id, lines)
    if await store.get_file(job.input_file_id) is None:
        name = f"{job.run_id}.jsonl"
        record = FileRecord(id=job.input_file_id, filename=name, purpose="batch", num_bytes=num_bytes, created_at=now)
        await store.add_file(record)
    window = job.options.get("deadline") or NO_DEADLINE
    batch = BatchRecord(
        id=job.batch_id,
        endpoint=lines.endpoint,
        input_file_id=job.input_file_id,
        completion_window=window,
        created_at=now,
        expires_at=now + parse_window(window),
    )
    await store.add_batch(batch)
    return batch


def _conclude(folder: JobFolder, job: Job, files: FileContents, batch: BatchRecord) -> Job:
    if batch.status == "failed":
        folder.clear(keep_job=False)  # so that the same command can be given again with the file in order
        raise refused(job.source, batch.errors)
    outcome = Outcome(
        status=batch.status,
        num_lines=batch.num_lines,
        num_completed=batch.num_completed,
        num_failed=batch.num_failed,
        num_prompt_tokens=batch.num_prompt_tokens,
        num_output_tokens=batch.num_output_tokens,
    )
    output = None if batch.output_file_id is None else files.path(batch.output_file_id)
    errors = None if batch.error_file_id is None else files.path(batch.error_file_id)
    return conclude(folder, job, outcome, output=output, errors=errors)


async def _answer(
    config: ServeConfig,
    options: Namespace,
    console: Console,
    text: "Text",
    cluster: "RayCluster",
    store: Store,
    files: FileContents,
    batch: BatchRecord,
) -> BatchRecord:
    """Runs the batch to its end. Raises StoppedError for a signal, and whatever makes going on pointless."""
    from cluster.controller.client import ControllerClient
    from cluster.ray_runtime.metrics import publish_forever

    stop, _ = catch_signals()
    async with contextlib.AsyncExitStack() as stack:
        controller = ControllerClient(config.deployment)
        watch = Watch(store, batch.id, has_deadline=options.deadline is not None)

        async def give_back() -> None:
            if not watch.is_cut_off:  # else nobody is there to be asked
                await (controller.stop_replicas() if cluster.is_ours else controller.down())

        stack.push_async_callback(give_back)
        await _unless(stop, controller.start(spec_of(config, own_cluster=cluster.is_ours)))
        tokenizer, template = await asyncio.wrap_future(text)
        startup = Startup(console, num_ranks=_num_ranks(config))
        stack.callback(startup.end)
        router = Router(policy=config.routing_policy)
        app = make_app(router=router, tokenizer=tokenizer, chat_template=template, model_name=config.model_name)

        def on_view(view: ClusterView) -> None:
            startup.take(view)
            watch.take(view)

        fleet = Fleet(controller, router, gateway_id=config.deployment, url=config.deployment, on_view=on_view)
        stack.push_async_callback(fleet.close)
        background = [
            asyncio.create_task(fleet.run()),
            asyncio.create_task(publish_forever(app[GATEWAY].metrics.registry)),
            asyncio.create_task(watch.run(router)),
        ]
        stack.push_async_callback(cancel_all, *background)
        # At once: the lines are checked while the replicas start.
        running = asyncio.create_task(run_batch(store, files, ApiLineExecutor(app[GATEWAY]), batch.id))
        stack.push_async_callback(cancel_all, running)
        starting = asyncio.create_task(startup.until_ready(router.health))
        stack.push_async_callback(cancel_all, starting)
        if await _first(stop, running, starting, watch.hopeless) is starting:
            starting.result()
            startup.end()
            display = Display()
            stack.callback(display.close)
            watch.display = display
            await _first(stop, running, watch.hopeless)
        if watch.hopeless.done():
            raise watch.hopeless.result()
        if not running.done():
            raise StoppedError("Stopped.")
        return running.result()


async def _first(stop: asyncio.Event, *tasks: "asyncio.Future[Any]") -> "asyncio.Future[Any] | None":
    """The first of them that is done; None if `stop` comes before."""
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


async def _end(store: Store, files: FileContents, job: Job) -> BatchRecord:
    assert job.batch_id is not None, "a job of this machine names its batch from the beginning"
    batch = await store.cancel_batch(job.batch_id, now=time.time())
    if batch is None:
        raise RequestError("The batch had not begun.")
    return batch if batch.has_ended else await run_batch(store, files, _NoExecutor(), job.batch_id)


class _NoExecutor(LineExecutor):
    """For a batch whose files alone are still to be made."""

    @property
    def capacity(self) -> int:
        return 0

    def check(self, endpoint: str, body: bytes, *, owner: str) -> str:
        raise AssertionError("this batch is past its validation")

    async def execute(self, line: Line, *, endpoint: str, body: bytes, seed: int, owner: str) -> LineResult:
        raise AssertionError("this batch is past its lines")
