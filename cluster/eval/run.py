"""Asks models the items of suites, several at a time, and checks the answers. Knows the journal; how a server is asked is its caller's.

An item whose request fails, also after `patience_s`, has an error: it counts as failed, and is asked again when the command runs again.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from cluster.eval.journal import Answer, Journal, request_key
from cluster.eval.model import Generated, Judge, Model
from cluster.eval.patience import Patience
from cluster.eval.suite import Item
from workers.errors import ReplicaUnavailableError, RequestError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """concurrency: requests at the same time."""

    items: Sequence[Item]
    concurrency: int = 8
    patience_s: float = 60.0


class _Oracle:
    """See `checks.Oracle`, for one item. prompt_tokens: of all that was asked of the model."""

    def __init__(self, model: Model, judge: Judge | None, item: Item, patience: Patience) -> None:
        self.prompt_tokens = 0
        self._model, self._judge, self._item, self._patience = model, judge, item, patience

    def logprob(self, option: str) -> float:
        scored = self._patience.ask(lambda: self._model.logprob(self._item, option))
        self.prompt_tokens += scored.prompt_tokens
        return scored.logprob

    def judge(self, question: str, answer: str) -> bool:
        judge = self._judge
        assert judge is not None, "the command requires a judge for such suites"
        return self._patience.ask(lambda: judge.verdict(self._item, question, answer))


def evaluate(
    models: Iterable[Model],
    plan: Plan,
    journal: Journal,
    *,
    judge: Judge | None = None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
    stop: threading.Event | None = None,
) -> dict[str, list[Answer]]:
    """The answers of each model, in the order of the items. stop: no further request begins, and what is missing is left out."""
    stop = stop or threading.Event()
    found: dict[str, dict[str, Answer]] = {}
    with ThreadPoolExecutor(plan.concurrency) as pool:
        waiting = {}
        for model in models:
            found[model.name] = {}
            for item in plan.items:
                question = (item.name, item.messages, item.max_tokens, item.check.source)
                key = request_key(model.name, model.settings, *question, judge and judge.settings)
                if (known := journal.answers.get(key)) is not None:
                    found[model.name][item.name] = known
                    on_answer(known)
                else:
                    waiting[pool.submit(_answer, model, item, key, judge, plan.patience_s, stop)] = model.name
        for future in as_completed(waiting):
            answer = future.result()
            if answer is not None:
                journal.add(answer)
                found[answer.model][answer.item] = answer
                on_answer(answer)
    return {
        name: [answers[item.name] for item in plan.items if item.name in answers] for name, answers in found.items()
    }


def _answer(
    model: Model, item: Item, key: str, judge: Judge | None, patience_s: float, stop: threading.Event
) -> Answer | None:
    if stop.is_set():
        return None

    patience = Patience(patience_s, stop)
    oracle = _Oracle(model, judge, item, patience)
    began = time.monotonic()
    try:
        generated = patience.ask(lambda: model.generate(item)) if item.check.needs_answer else Generated(text="")
        seconds = time.monotonic() - began
        passed = item.check.passes(generated.text, oracle)
    except (ReplicaUnavailableError, RequestError) as e:
        if stop.is_set():
            return None
        return Answer(key=key, model=model.name, item=item.name, error=str(e), seconds=time.monotonic() - began)
    return Answer(
        key=key,
        model=model.name,
        item=item.name,
        text=generated.text,
        passed=passed,
        prompt_tokens=generated.prompt_tokens + oracle.prompt_tokens,
        output_tokens=generated.output_tokens,
        seconds=seconds,
    )
