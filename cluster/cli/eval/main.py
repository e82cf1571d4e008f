"""`tramontane eval`: from options to suites and models, from answers to a table and files.

Knows the options, the progress bar and where results go. Suites, checks and scores are in cluster/eval.
"""

import contextlib
import json
import logging
import re
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.cli.client import Client
from cluster.cli.eval.served_model import ServedModel
from cluster.cli.measured_server import first_model, shown_command
from cluster.eval.journal import Answer, Journal
from cluster.eval.page import page
from cluster.eval.report import Prices, Report, as_json, result_of, table, verdicts
from cluster.eval.run import Plan, evaluate
from cluster.eval.suite import Item, built_in_names, load_suite
from cluster.terminal.phases import Console
from cluster.terminal.tables import answer_console
from workers.errors import ConfigError

log = logging.getLogger(__name__)


def evaluate_command(args: Namespace) -> None:
    """Asks, prints the table and writes the files. Raises ConfigError for options that cannot work."""
    items = [item for name in _suites(args.suites) for item in load_suite(name)]
    if args.max_items is not None:
        items = _first_of_each(items, args.max_items)
    if args.judge is None and any(item.check.needs_judge for item in items):
        raise ConfigError(
            "A suite has items that a judge model decides.", remedy="Name one with --judge.", param="--judge"
        )
    began = datetime.now(UTC).isoformat(timespec="seconds")
    fields = _fields(args.set or [])
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(args.url, args))
        models = [
            ServedModel(client, args.model or first_model(client), uses_chat=args.endpoint == "chat", fields=fields)
        ]
        if args.baseline is not None or args.baseline_url is not None:
            other = stack.enter_context(_client(args.baseline_url or args.url, args))
            models.append(_baseline(args, other, models[0], fields))
        judge = None
        if args.judge is not None:
            judge_client = stack.enter_context(_client(args.judge_url or args.url, args))
            judge = ServedModel(judge_client, args.judge, uses_chat=True, fields={})
        folder = args.output or Path(f"eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', models[0].name)}")
        journal = stack.enter_context(Journal(folder / "answers.jsonl"))
        stop = threading.Event()
        plan = Plan(items=items, concurrency=args.concurrency, patience_s=args.patience)
        with _stopping(stop), _progress(len(items) * len(models)) as advance:
            answers = evaluate(models, plan, journal, judge=judge, on_answer=advance, stop=stop)
    report = _report(args, models, answers, began=began, is_whole=not stop.is_set())
    if report is None:
        raise KeyboardInterrupt
    answer_console().print(table(report))
    for sentence in verdicts(report):
        answer_console().print(sentence)
    _write(folder, report)
    if stop.is_set():
        Console().line("Stopped. The same command goes on from here.")


def _suites(names: str | None) -> list[str]:
    return built_in_names() if names is None else [name.strip() for name in names.split(",")]


def _baseline(args: Namespace, client: Client, model: ServedModel, fields: dict[str, Any]) -> ServedModel:
    """Shown with its address where both servers give their models the same name."""
    name = args.baseline or first_model(client)
    shown = name if name != model.name else f"{name} ({client.url})"
    if shown != name and client.url == model.url:
        raise ConfigError(f"--baseline {name} is the model itself.", remedy="Name another model.", param="--baseline")
    return ServedModel(client, name, shown=shown, uses_chat=args.endpoint == "chat", fields=fields)


def _report(
    args: Namespace, models: Sequence[ServedModel], answers: dict[str, list[Answer]], *, began: str, is_whole: bool
) -> Report | None:
    prices = Prices(prompt=args.price_prompt, output=args.price_output)
    if not any(answers.values()):
        return None
    baseline = answers[models[1].name] if len(models) > 1 else []
    results = [result_of(models[0].name, answers[models[0].name], prices, baseline=baseline)]
    results += [result_of(model.name, answers[model.name], prices) for model in models[1:]]
    return Report(models=results, is_whole=is_whole, command=shown_command(), began=began)


def _write(folder: Path, report: Report) -> None:
    for name, text in (
        ("report.json", json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n"),
        ("report.html", page(report)),
    ):
        path = folder / name
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as e:
            raise ConfigError(
                f"{path} cannot be written: {e.strerror}.",
                remedy="Give another folder with --output.",
                param="--output",
            ) from e
        Console().line(f"Wrote {path}.")
    errors = [answer for model in report.models for answer in model.answers if answer.error is not None]
    if errors:
        Console().line(
            f"{len(errors)} items have an error and count as failed; the same command asks them again. The first: {errors[0].error}"
        )


def _client(url: str, args: Namespace) -> Client:
    return Client(url, api_key=args.api_key, ca_cert=args.ca_cert, timeout_s=args.timeout)


def _fields(pairs: Sequence[str]) -> dict[str, Any]:
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError as e:
            raise ConfigError(
                f"--set {pair} is not FIELD=VALUE with a value in JSON.",
                remedy="Write text in quotes: --set stop='\"x\"'.",
                param="--set",
            ) from e
        if not equals or not name:
            raise ConfigError(f"--set {pair} names no field.", remedy="Write FIELD=VALUE.", param="--set")
    return fields


def _first_of_each(items: Sequence[Item], number: int) -> list[Item]:
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        seen[item.suite] = seen.get(item.suite, 0) + 1
        if seen[item.suite] <= number:
            kept.append(item)
    return kept


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Answer], None]]:
    bar = Console().bar()
    done = passed = 0

    def advance(answer: Answer) -> None:
        nonlocal done, passed
        done, passed = done + 1, passed + answer.passed
        bar.show(before="  items", done=done, total=total, after=f"{done} of {total}, {passed} passed")

    try:
        yield advance
    finally:
        bar.close()


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM sets `stop`: requests that run are waited for. A second one ends the process as ever."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(*_: object) -> None:
        stop.set()
        for number in numbers:
            signal.signal(number, before[number])

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])
