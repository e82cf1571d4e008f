"""`tramontane serve`: brings Ray, one replica and the HTTP server up in order, and down again in the opposite one.

Knows the order and what overlaps with what: Ray starts in the main thread while another reads the tokenizer. Knows no endpoint
and no engine. Whatever ends it, an error or a signal, no process and no file is left.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from cluster.config import API_KEY_ENV, ServeConfig, check_port_is_free, detect_device, serve_config
from cluster.console import Console, Phase
from cluster.models import resolve_model
from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.api.listener import Listener
    from cluster.replicas.ray_cluster import RayCluster
    from cluster.replicas.replica import RayReplica
    from cluster.router.router import Router
    from cluster.text.chat import ChatTemplate
    from cluster.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

OWN_CLUSTER_PLACEMENT_TIMEOUT_S = 10.0  # nothing will be added to it: what is not free soon never will be
PHASES = {
    "placing": "Placing {n} rank(s)",
    "joining": "Joining the ranks",
    "loading": "Loading the weights",
    "starting": "Starting the engine",
}


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
    check_port_is_free(config.host, config.port)
    with ThreadPoolExecutor(1, thread_name_prefix="text") as pool:
        text = pool.submit(_load_text, config, args.chat_template)
        with _ray(console, config) as cluster:
            if config.ray_address and args.device == "auto" and cluster.num_gpus() >= args.tensor_parallel_size:
                config = serve_config(args, folder, model_name, device="cuda")
            asyncio.run(_run(config, console, text, cluster))


def _headline(config: ServeConfig) -> str:
    engine = config.engine
    ranks = f"{engine.tensor_parallel_size} tensor-parallel rank{'s' * (engine.tensor_parallel_size > 1)}"
    return f"Tramontane {version('tramontane')}: {config.model_name}, {engine.dtype}, {ranks} on {engine.device}"


def _load_text(config: ServeConfig, template: str | None) -> tuple["Tokenizer", "ChatTemplate | None"]:
    from cluster.text.chat import ChatTemplate
    from cluster.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(
        config.engine.model_path,
        version=template,  # type: ignore[arg-type]  # argparse offers only known versions
        model_vocab_size=config.engine.model.vocab_size,
    )
    try:
        return tokenizer, ChatTemplate(tokenizer)
    except ConfigError as e:
        if template is not None:
            raise
        log.warning("Chat is off: %s", e)
        return tokenizer, None


@contextmanager
def _ray(console: Console, config: ServeConfig) -> Iterator["RayCluster"]:
    console.line(_headline(config))
    with console.phase(f"Joining Ray at {config.ray_address}" if config.ray_address else "Starting Ray"):
        from cluster.replicas.ray_cluster import connect

        cluster = connect(config.ray_address, num_cpus=config.engine.tensor_parallel_size, log_to_driver=True)
    try:
        yield cluster
    finally:
        cluster.close()


async def _run(
    config: ServeConfig,
    console: Console,
    text: "Future[tuple[Tokenizer, ChatTemplate | None]]",
    cluster: "RayCluster",
) -> None:
    stop, stop_now = _catch_signals()
    starting = asyncio.create_task(_start(config, console, text, cluster))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            console.line("Stopping.")
            return
        router, listener, replica = starting.result()
        try:
            console.line(_banner(config, listener.port, cluster, console.elapsed_s))
            await stop.wait()
            console.line(
                f"Stopping: running requests have {config.drain_timeout_s:g} s to finish (Ctrl-C again: at once)."
            )
            await _drain(router, listener, config.drain_timeout_s, stop_now)
        finally:
            await listener.close()
            await replica.close()
        console.line("Stopped.")
    finally:
        stopping.cancel()
        starting.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


def _catch_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first and the second SIGINT or SIGTERM."""
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop, stop_now


async def _start(
    config: ServeConfig,
    console: Console,
    text: "Future[tuple[Tokenizer, ChatTemplate | None]]",
    cluster: "RayCluster",
) -> tuple["Router", "Listener", "RayReplica"]:
    from cluster.api.app import make_app
    from cluster.api.listener import Listener
    from cluster.replicas.replica import PLACEMENT_TIMEOUT_S, RayReplica
    from cluster.router.router import Router

    tokenizer, chat_template = await asyncio.wrap_future(text)
    replica = RayReplica(
        "r0",
        config.engine,
        log_level=config.log_level.upper(),
        placement_timeout_s=OWN_CLUSTER_PLACEMENT_TIMEOUT_S if cluster.is_ours else PLACEMENT_TIMEOUT_S,
    )
    async with _phases(console, config.engine.tensor_parallel_size) as phases:
        await replica.start(on_phase=phases.begin, on_progress=phases.progress)
    try:
        router = Router([replica.client])
        app = make_app(
            router=router,
            tokenizer=tokenizer,
            chat_template=chat_template,
            model_name=config.model_name,
            api_key=config.api_key,
        )
        try:
            listener = await Listener(app).open(config.host, config.port)
        except OSError as e:
            raise ConfigError(f"Port {config.port} on {config.host} was taken meanwhile: {e.strerror}.") from e
        await _until_ready(replica)
    except BaseException:
        await replica.close()
        raise
    return router, listener, replica


class _Phases:
    """Turns a replica's phase names into lines: each begins when the one before ends."""

    def __init__(self, console: Console, num_ranks: int) -> None:
        self._console = console
        self._num_ranks = num_ranks
        self._stack = contextlib.ExitStack()
        self._current: Phase | None = None

    def begin(self, name: str) -> None:
        self._stack.close()
        self._current = self._stack.enter_context(self._console.phase(PHASES[name].format(n=self._num_ranks)))

    def progress(self, done: int, total: int) -> None:
        if self._current is not None:
            self._current.progress(done, total)

    def end(self) -> None:
        self._stack.close()


@asynccontextmanager
async def _phases(console: Console, num_ranks: int) -> AsyncIterator[_Phases]:
    phases = _Phases(console, num_ranks)
    try:
        yield phases
    finally:
        phases.end()


async def _until_ready(replica: "RayReplica", timeout_s: float = 60.0) -> None:
    """The first forward pass on all ranks. Raises ConfigError with the replica's reason when it does not come."""
    deadline = time.monotonic() + timeout_s
    while (reason := replica.client.not_ready_reason(time.monotonic())) is not None:
        if time.monotonic() > deadline:
            raise ConfigError(reason)
        await asyncio.sleep(0.02)


async def _drain(router: "Router", listener: "Listener", timeout_s: float, stop_now: asyncio.Event) -> None:
    """Takes nothing new and waits for what runs, for a while."""
    router.start_draining()
    await listener.stop_accepting()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while router.num_inflight_requests and not stop_now.is_set():
                await asyncio.sleep(0.05)


def _banner(config: ServeConfig, port: int, cluster: "RayCluster", elapsed_s: float) -> str:
    from cluster.replicas.ray_cluster import token_path

    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        config.host, f"[{config.host}]" if ":" in config.host else config.host
    )
    url = f"http://{host}:{port}"
    body = json.dumps({"model": config.model_name, "prompt": "def fibonacci(n):", "max_tokens": 64})
    # The key itself is never printed; where the environment holds it, the line works as pasted.
    key_word = f"${API_KEY_ENV}" if os.environ.get(API_KEY_ENV) == config.api_key else "YOUR_KEY"
    key = f' -H "Authorization: Bearer {key_word}"' if config.api_key else ""
    lines = [
        "",
        f"Ready in {elapsed_s:.1f} s.",
        f"  Endpoint   {url}/v1",
        f"  Try        curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
    ]
    if cluster.dashboard_url:
        path = token_path()
        lines.append(f"  Dashboard  {cluster.dashboard_url}" + (f" (its token is in {path})" if path else ""))
    return "\n".join([*lines, "  Stop       Ctrl-C", ""])
