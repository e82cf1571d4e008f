"""`tramontane bench`: from options to a plan, from a plan to results, from results to a table and files.

Knows the options, the progress bar and where results go. Loads, statistics and reports are in cluster/bench.
"""

import asyncio
import contextlib
import logging
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.bench.load import Clock
from cluster.bench.probe import Server, probe
from cluster.bench.report.charts import charts
from cluster.bench.report.json_file import as_json
from cluster.bench.report.page import page
from cluster.bench.report.png import check_matplotlib, write_pngs
from cluster.bench.report.results import Results, put_together
from cluster.bench.report.table import tables
from cluster.bench.rounds import Plan, Progress, Run, Watch, run_rounds
from cluster.cli.bench.plan import plan_of
from cluster.cli.bench.streams import StreamClient
from cluster.cli.client import Client
from cluster.cli.measured_server import first_model, shown_command
from cluster.terminal.phases import Console
from cluster.terminal.tables import answer_console
from workers.errors import ConfigError

log = logging.getLogger(__name__)


def bench(args: Namespace) -> None:
    """Measures, prints the table and writes the files. Raises ConfigError for options that cannot work."""
    if args.plots is not None:
        check_matplotlib()
    _check_targets(args)
    plan, fields = plan_of(args), dict(args.set or ())
    began = datetime.now(UTC).isoformat(timespec="seconds")
    results = asyncio.run(_measure(args, plan, fields, began=began))
    answer_console().print(tables(results))
    for what, path, write in _files(args, results):
        try:
            write(path)
        except OSError as e:
            raise ConfigError(
                f"{path} cannot be written: {e.strerror or e}.", remedy=f"Give another path with {what}.", param=what
            ) from e
        log.info("wrote %s", path)
        Console().line(f"Wrote {path}.")


async def _measure(args: Namespace, plan: Plan, fields: dict[str, Any], *, began: str) -> Results:
    async with contextlib.AsyncExitStack() as stack:
        servers = [await _open(args, fields, stack, url=args.url, model=args.model, key=args.api_key)]
        if args.compare is not None:
            model = args.compare_model or args.model
            try:
                second = await _open(args, fields, stack, url=args.compare, model=model, key=args.compare_api_key)
            except ConfigError as e:
                raise _about_the_second(e, args.compare) from e
            if second[0].name == servers[0][0].name:
                second = (replace(second[0], name=f"{second[0].name} ({second[0].model}, second)"), second[1])
            servers.append(second)
        runs: list[Run] = []
        stop = asyncio.Event()
        with _stopping(stop), _shown() as watch:
            clock = Clock(time.perf_counter, asyncio.sleep)
            await run_rounds(plan, servers, clock=clock, stop=stop, runs=runs, watch=watch)
    if not runs:
        raise KeyboardInterrupt
    return put_together(
        runs,
        plan=plan,
        servers=[server for server, _ in servers],
        objective=args.objective,
        price_per_hour=args.price_per_hour,
        began=began,
        command=shown_command(),
        is_whole=not stop.is_set(),
    )


def _about_the_second(error: ConfigError, url: str) -> ConfigError:
    """The same problem with the names of the second server's options."""
    options = {"--api-key": ("--compare-api-key", "key"), "--url": ("--compare", "address")}
    if error.param not in options:
        return error
    option, what = options[error.param]
    return ConfigError(
        f"--compare {url}: {error.message.rstrip('.')}.", remedy=f"Check its {what}, {option}.", param=option
    )


async def _open(
    args: Namespace,
    fields: dict[str, Any],
    stack: contextlib.AsyncExitStack,
    *,
    url: str,
    model: str | None,
    key: str | None,
) -> tuple[Server, StreamClient]:
    """A server that answers. Raises what `probe` and `Client` raise."""
    with Client(url, api_key=key, ca_cert=args.ca_cert) as client:
        if model is None:
            model = await asyncio.to_thread(first_model, client)
        transport = await stack.enter_async_context(StreamClient(client, ca_cert=args.ca_cert, silence_s=args.timeout))
        found = await probe(
            transport,
            name=client.url,
            model=model,
            endpoint=args.endpoint,
            fields=fields,
            want_text=args.text,
            vocab_size=args.vocab_size,
        )
    return found, transport


@contextlib.contextmanager
def _stopping(stop: asyncio.Event) -> Any:
    """The first Ctrl-C or SIGTERM sets `stop`; a second one ends the process as ever."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def ask() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    try:
        for number in signals:
            loop.add_signal_handler(number, ask)
    except (RuntimeError, ValueError):  # not in the main thread, as in a test: there is nothing to catch
        pass
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _shown() -> Any:
    """A bar on a terminal; elsewhere a line for each run."""
    console = Console()
    bar = console.bar()
    last = ""

    def show(progress: Progress) -> None:
        nonlocal last
        if console.is_terminal:
            failed = f", {progress.num_failed:,} failed" if progress.num_failed else ""
            after = (
                f"{progress.num_done:,} of {progress.num_requests:,} requests, {progress.num_tokens:,} tokens{failed}"
            )
            bar.show(before=f"  {progress.what}", done=progress.num_done, total=progress.num_requests, after=after)
        elif progress.what != last:
            last = progress.what
            console.line(f"  {progress.what}")

    try:
        yield Watch(show)
    finally:
        bar.close()


def _files(args: Namespace, results: Results) -> list[tuple[str, Path, Callable[[Path], object]]]:
    """(option, path, what writes it) of every file that was asked for."""
    found: list[tuple[str, Path, Callable[[Path], object]]] = []
    if args.json is not None:
        data = as_json(results, with_requests=args.all_requests)
        found.append(("--json", args.json, lambda path: path.write_bytes(data)))
    if args.html is not None:
        text = page(results).encode()
        found.append(("--html", args.html, lambda path: path.write_bytes(text)))
    if args.plots is not None:
        found.append(("--plots", args.plots, lambda path: write_pngs(charts(results), path)))
    return found


def _check_targets(args: Namespace) -> None:
    """A long benchmark must not fail at its end. Raises ConfigError."""
    for name in ("json", "html"):
        path: Path | None = getattr(args, name)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(
                f"--{name} {path} cannot be written: its folder does not exist, or it is a folder itself.",
                remedy="Make the folder, or give another path.",
                param=f"--{name}",
            )
    if args.all_requests and args.json is None:
        raise ConfigError(
            "--all-requests has no effect without --json.", remedy="Add --json FILE.", param="--all-requests"
        )
