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
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.cli.client import Client
from cluster.cli.eval.models_report import print_models_table
from cluster.cli.eval.served_model import ServedModel
from cluster.cli.measured_server import first_model, shown_command
from cluster.eval.harness.lm import Asking
from cluster.eval.harness.scoring import score_suites
from cluster.eval.harness.tasks import PREFIX, HarnessSuite, load_tasks
from cluster.eval.journal import Answer, Journal
from cluster.eval.page import page
from cluster.eval.report import Prices, Report, as_json, details_table, result_of, table, verdicts
from cluster.eval.run import Plan, evaluate
from cluster.eval.scores import Mean
from cluster.eval.suite import Item, built_in_names, load_suite
from cluster.terminal.phases import Console
from cluster.terminal.tables import answer_console
from workers.errors import ConfigError, RequestError

log = logging.getLogger(__name__)


def evaluate_command(args: Namespace) -> None:
    """Asks, prints the table and writes the files. Raises ConfigError for options that cannot work."""
    if args.report:
        print_models_table(args)
        return
    suites = built_in_names() if args.suites is None else [name.strip() for name in args.suites.split(",")]
    items = [item for name in suites if not name.startswith(PREFIX) for item in load_suite(name)]
    if args.max_items is not None:
        items = _first_of_each(items, args.max_items)
    tasks = load_tasks(
        [name.removeprefix(PREFIX) for name in suites if name.startswith(PREFIX)], num_fewshot=args.num_fewshot
    )
    _check(args, items, tasks)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    with contextlib.ExitStack() as stack:
        models = _models(args, stack)
        judge = None
        if args.judge is not None:
            judge_client = stack.enter_context(_client(args.judge_url or args.url, args))
            judge = ServedModel(judge_client, args.judge, uses_chat=True, fields={})
        folder = args.output or Path(f"eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', models[0].name)}")
        journal = stack.enter_context(Journal(folder / "answers.jsonl"))
        stop = threading.Event()
        plan = Plan(items=items, concurrency=args.concurrency, patience_s=args.patience)
        with _stopping(stop), contextlib.closing(_Progress(len(items) * len(models))) as progress:
            answers = evaluate(models, plan, journal, judge=judge, on_answer=progress.advance, stop=stop)
            found = _Found(answers)
            if tasks:
                found.add_tasks(args, tasks, models, journal=journal, stop=stop, progress=progress)
    report = found.report(args, models, began=began, is_whole=not stop.is_set())
    if report is None:
        raise KeyboardInterrupt
    _check_answers(report)
    console = answer_console()
    console.print(table(report))
    console.print(details_table(report), end="\n")
    for sentence in verdicts(report):
        console.print(sentence)
    _write(folder, report)
    if stop.is_set():
        Console().line("Stopped. The same command goes on from here.")


def _check(args: Namespace, items: Sequence[Item], tasks: Sequence[HarnessSuite]) -> None:
    """Raises ConfigError."""
    if args.judge is None and any(item.check.needs_judge for item in items):
        raise ConfigError(
            "A suite has items that a judge model decides.", remedy="Name one with --judge.", param="--judge"
        )
    for name in ("metric", "num_fewshot"):
        if getattr(args, name) is not None and not tasks:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect without a suite lm-eval:TASK.", remedy="Leave it out.", param=flag)
    for name in ("bench", "price_per_hour"):
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect without --report.", remedy="Add --report.", param=flag)


def _check_answers(report: Report) -> None:
    """Raises RequestError if a model answered nothing at all: its scores would be those of a misspelled name, for example."""
    for model in report.models:
        errors = [answer.error for answer in model.answers if answer.error is not None]
        if errors and len(errors) == len(model.answers):
            raise RequestError(
                f"{model.name} has answered none of the {len(errors)} questions. The first error: {errors[0]}",
                remedy="Then run the same command again.",
            )


def _models(args: Namespace, stack: contextlib.ExitStack) -> list[ServedModel]:
    """The model, and the baseline if there is one."""
    fields, uses_chat = dict(args.set or ()), args.endpoint == "chat"
    client = stack.enter_context(_client(args.url, args))
    model = ServedModel(client, args.model or first_model(client), uses_chat=uses_chat, fields=fields)
    if args.baseline is None and args.baseline_url is None:
        return [model]
    other = stack.enter_context(_client(args.baseline_url or args.url, args))
    name = args.baseline or first_model(other)
    # With its address where both servers give their models the same name.
    shown = name if name != model.name else f"{name} ({other.url})"
    if shown != name and other.url == model.url:
        raise ConfigError(f"--baseline {name} is the model itself.", remedy="Name another model.", param="--baseline")
    return [model, ServedModel(other, name, shown=shown, uses_chat=uses_chat, fields=fields)]


class _Found:
    """What came of the suites, by model."""

    def __init__(self, answers: dict[str, list[Answer]]) -> None:
        self.answers = answers
        self.means: dict[str, dict[str, Mean]] = {}
        self.more: dict[str, dict[str, dict[str, Any]]] = {}

    def add_tasks(
        self,
        args: Namespace,
        tasks: Sequence[HarnessSuite],
        models: Sequence[ServedModel],
        *,
        journal: Journal,
        stop: threading.Event,
        progress: "_Progress",
    ) -> None:
        asking = Asking(
            journal=journal,
            concurrency=args.concurrency,
            patience_s=args.patience,
            stop=stop,
            on_requests=progress.expect,
            on_answer=progress.advance,
        )
        for model in models:
            scored = score_suites(tasks, model, asking, max_items=args.max_items, metric=args.metric)
            self.answers[model.name] += scored.answers
            self.means[model.name], self.more[model.name] = scored.means, scored.more

    def report(self, args: Namespace, models: Sequence[ServedModel], *, began: str, is_whole: bool) -> Report | None:
        if not any(self.answers.values()):
            return None
        prices = Prices(prompt=args.price_prompt, output=args.price_output)
        results = [
            result_of(
                model.name,
                self.answers[model.name],
                prices,
                baseline=self.answers[models[1].name] if model is models[0] and len(models) > 1 else [],
                means=self.means.get(model.name),
                more=self.more.get(model.name),
            )
            for model in models
        ]
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


def _first_of_each(items: Sequence[Item], number: int) -> list[Item]:
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        seen[item.suite] = seen.get(item.suite, 0) + 1
        if seen[item.suite] <= number:
            kept.append(item)
    return kept


class _Progress:
    """A bar of answers; how many there will be may change. Close it."""

    def __init__(self, total: int) -> None:
        self._bar = Console().bar()
        self._total = total
        self._done = self._passed = 0

    def expect(self, number: int) -> None:
        self._total += number
        self._show()

    def advance(self, answer: Answer) -> None:
        self._done, self._passed = self._done + 1, self._passed + answer.passed
        self._show()

    def close(self) -> None:
        self._bar.close()

    def _show(self) -> None:
        after = f"{self._done} of {self._total}" + (f", {self._passed} passed" if self._passed else "")
        self._bar.show(before="  items", done=self._done, total=self._total, after=after)


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
