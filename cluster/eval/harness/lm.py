"""A served model as lm-eval wants one: log-likelihoods of texts, and generation up to a stop sequence. Knows no task.

Every answer goes to the journal as it comes, under a key of the request itself, so that no request is sent twice, also after a crash.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.eval.journal import Answer, Journal, request_key
from cluster.eval.model import TextModel
from cluster.eval.patience import Patience
from workers.errors import ReplicaUnavailableError, RequestError

DEFAULT_MAX_TOKENS = 256  # lm-eval's
_OWN_FIELDS = ("until", "max_gen_toks", "max_tokens", "do_sample", "temperature")
_SAMPLING_FIELDS = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


class Instance(Protocol):
    """A request of a task, as lm-eval makes it. args: as the method of its type takes them."""

    request_type: str
    args: tuple[Any, ...]
    idx: int
    task_name: str
    doc_id: int


class Stopped(Exception):
    """The user ended the evaluation: this task has not all of its answers."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How requests are sent. on_requests: how many there will be, which is known only when a task is built; on_answer: one has come."""

    journal: Journal
    concurrency: int
    patience_s: float
    stop: threading.Event
    on_requests: Callable[[int], None]
    on_answer: Callable[[Answer], None]


class ServedLM:
    """What lm-eval calls of its class LM. answers: (task, number of the document) -> what was answered for it, in the order of its
    requests. rank, world_size: one process asks everything.
    """

    rank, world_size = 0, 1

    def __init__(self, model: TextModel, asking: Asking) -> None:
        self.answers: dict[tuple[str, int], list[Answer]] = defaultdict(list)
        self._model = model
        self._asking = asking

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        found = self._ask(requests, self._score)
        return [(float("-inf"), False) if a.logprob is None else (a.logprob, a.is_greedy) for a in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        return [float("-inf") if a.logprob is None else a.logprob for a in self._ask(requests, self._score_text)]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return [answer.text for answer in self._ask(requests, self._generate)]

    def _score(self, answer: Answer, args: Sequence[Any], _: int) -> Answer:
        context, continuation = args
        scored = self._model.score(context, continuation)
        return _changed(
            answer,
            text=continuation,
            logprob=scored.logprob,
            is_greedy=scored.is_greedy,
            prompt_tokens=scored.prompt_tokens,
        )

    def _score_text(self, answer: Answer, args: Sequence[Any], _: int) -> Answer:
        scored = self._model.score_text(args[0])
        return _changed(answer, logprob=scored.logprob, prompt_tokens=scored.prompt_tokens)

    def _generate(self, answer: Answer, args: Sequence[Any], number: int) -> Answer:
        prompt, settings = args
        stop = stop_sequences(settings)
        fields = {name: settings[name] for name in _SAMPLING_FIELDS if name in settings}
        generated = self._model.complete(
            prompt,
            max_tokens=int(settings.get("max_gen_toks", settings.get("max_tokens", DEFAULT_MAX_TOKENS))),
            stop=stop,
            seed=number,
            fields={**fields, "temperature": temperature(settings)},
        )
        return _changed(
            answer,
            text=cut(generated.text, stop),
            prompt_tokens=generated.prompt_tokens,
            output_tokens=generated.output_tokens,
        )

    def _ask(self, requests: Sequence[Instance], ask: Callable[[Answer, Sequence[Any], int], Answer]) -> list[Answer]:
        """The answer to each request, from the journal where it is there. Raises Stopped."""
        asking, patience = self._asking, Patience(self._asking.patience_s, self._asking.stop)
        asking.on_requests(len(requests))
        seen: Counter[str] = Counter()
        keys, found, waiting = [], {}, {}

        def answer(request: Instance, key: str, number: int) -> Answer | None:
            if asking.stop.is_set():
                return None
            began = time.monotonic()
            empty = Answer(key=key, model=self._model.name, item=f"{request.task_name}/{request.doc_id}/{request.idx}")
            try:
                whole = patience.ask(lambda: ask(empty, request.args, number))
            except (ReplicaUnavailableError, RequestError) as e:
                return None if asking.stop.is_set() else _changed(empty, error=str(e))
            return _changed(whole, seconds=time.monotonic() - began)

        with ThreadPoolExecutor(asking.concurrency) as pool:
            for request in requests:
                question = (self._model.name, self._model.settings, request.request_type, request.args)
                # Repeats of a question are different samples; without sampling they have one answer.
                same = request_key(*question)
                number = seen[same] if request.request_type == "generate_until" and is_sampled(request.args[1]) else 0
                seen[same] += 1
                key = request_key(*question, number)
                keys.append(key)
                if key in found or key in waiting:
                    continue
                if (known := asking.journal.answers.get(key)) is not None:
                    found[key] = known
                    asking.on_answer(known)
                else:
                    waiting[key] = pool.submit(answer, request, key, number)
            for future in as_completed(waiting.values()):
                if (new := future.result()) is not None:
                    asking.journal.add(new)
                    found[new.key] = new
                    asking.on_answer(new)
        if len(found) < len(set(keys)):
            raise Stopped
        asking.on_requests(len(found) - len(requests))  # fewer were asked, where some are the same
        for request, key in zip(requests, keys, strict=True):
            self.answers[request.task_name, request.doc_id].append(found[key])
        return [found[key] for key in keys]


def _changed(answer: Answer, **fields: Any) -> Answer:
    return Answer(**{name: getattr(answer, name) for name in answer.__struct_fields__} | fields)


def stop_sequences(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else [text for text in until if text]


def is_sampled(settings: dict[str, Any]) -> bool:
    return temperature(settings) > 0


def temperature(settings: dict[str, Any]) -> float:
    """do_sample: false is greedy, whatever the temperature is; without either, greedy too."""
    if settings.get("do_sample") is False:
        return 0.0
    return float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))


def cut(text: str, stop: Sequence[str]) -> str:
    """Before the first stop sequence, for servers that take fewer of them than a task has."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]
