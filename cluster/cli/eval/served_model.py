"""A model of an OpenAI-compatible server, asked for answers, for log-probabilities of given texts, and for verdicts on others' answers.

Knows the requests and answers of /v1/chat/completions, /v1/completions and, for texts longer than the model's context, /tokenize and
/v1/models; no suites and no scores.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from cluster.cli.client import Client
from cluster.eval.model import Generated, Scored
from cluster.eval.suite import Item
from workers.errors import ConfigError, RequestError

JUDGE_PROMPT = (
    "You check an answer. Reply with the word yes or the word no, and nothing else.\n\n"
    "Question to the model:\n{question}\n\nIts answer:\n{answer}\n\n{criterion}"
)


class _Message(msgspec.Struct):
    content: str | None = None


class _Logprobs(msgspec.Struct):
    """Of each token of the prompt. top_logprobs: the likeliest tokens there, by their text."""

    token_logprobs: list[float | None] = []
    text_offset: list[int] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    message: _Message | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class ServedModel:
    """See `cluster.eval.model`: one model of one server, asked by chat, or by text for a model without a chat template."""

    def __init__(
        self, client: Client, name: str, *, uses_chat: bool, fields: dict[str, Any], shown: str | None = None
    ) -> None:
        """name: in requests. shown: in reports, if that is another one. fields: further ones of each request."""
        self.name = shown or name
        self.url = client.url
        self.settings: object = {"url": client.url, "model": name, "uses_chat": uses_chat, **fields}
        self._served = name
        self._client = client
        self._uses_chat = uses_chat
        self._fields = fields
        self._max_model_len: int | None = None
        self._context_lengths: dict[str, int] = {}

    def generate(self, item: Item) -> Generated:
        body = {"model": self._served, "max_tokens": item.max_tokens, "temperature": 0.0, "seed": 0, **self._fields}
        if not self._uses_chat:
            return self._generated({**body, "prompt": _as_text(item.messages)})
        answer = self._client.post("/v1/chat/completions", {**body, "messages": list(item.messages)}, _Completion)
        message = answer.choices[0].message if answer.choices else None
        return _of_usage(answer, (message.content or "") if message is not None else "")

    def logprob(self, item: Item, option: str) -> Scored:
        prompt = _as_text(item.messages)
        return self.score(prompt if prompt[-1:].isspace() else f"{prompt} ", option)

    def complete(
        self, prompt: str, *, max_tokens: int, stop: Sequence[str], seed: int, fields: Mapping[str, Any]
    ) -> Generated:
        body: dict[str, Any] = {"model": self._served, "max_tokens": max_tokens, "seed": seed, **fields, **self._fields}
        return self._generated({**body, "prompt": prompt, **({"stop": list(stop)} if stop else {})})

    def score(self, context: str, continuation: str) -> Scored:
        """As lm-eval: white space at the end of the context belongs to the continuation, and of the tokens of both together, the
        continuation has those after as many as the context has alone. They follow what the model sees in the whole text; lm-eval puts the
        two parts' ids together, which differs where a token reaches over the border.
        """
        whole = context + continuation
        answer, found = self._echo(whole)
        num_context = self._num_tokens(context.rstrip())
        offsets = zip(range(len(found.text_offset)), found.text_offset, strict=True)
        return _scored(answer, found, [i >= num_context and offset < len(whole) for i, offset in offsets])

    def score_text(self, text: str) -> Scored:
        windows = self._windows(text)
        if windows is None:
            answer, found = self._echo(text)
            return _scored(answer, found, [True] * len(found.token_logprobs))
        logprob, num_tokens = 0.0, 0
        for token_ids, num_seen in windows:
            answer, found = self._echo(token_ids)
            scored = _scored(answer, found, [i >= num_seen for i in range(len(token_ids))])
            logprob, num_tokens = logprob + scored.logprob, num_tokens + scored.prompt_tokens
        return Scored(logprob=logprob, prompt_tokens=num_tokens)

    def verdict(self, item: Item, question: str, answer: str) -> bool:
        prompt = JUDGE_PROMPT.format(question=_as_text(item.messages), answer=answer, criterion=question)
        body = {
            "model": self._served,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 8,
            "temperature": 0.0,
        }
        said = self._client.post("/v1/chat/completions", body, _Completion).choices[0].message
        return re.match(r"\W*yes\b", (said.content or "") if said is not None else "", re.IGNORECASE) is not None

    def _generated(self, body: dict[str, Any]) -> Generated:
        answer = self._client.post("/v1/completions", body, _Completion)
        return _of_usage(answer, answer.choices[0].text if answer.choices else "")

    def _echo(self, prompt: str | list[int]) -> tuple[_Completion, _Logprobs]:
        """The answer to a request for nothing but the prompt's log-probabilities. Raises RequestError where the server gives none."""
        own = {"model": self._served, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
        body = {**self._fields, **own}
        answer = self._client.post("/v1/completions", body, _Completion)
        found = answer.choices[0].logprobs if answer.choices else None
        if found is None or not 0 < len(found.token_logprobs) == len(found.text_offset):
            raise RequestError(
                "The server gives no log-probabilities of a prompt (`echo` with `logprobs`).",
                remedy="Leave out suites with `choice` and tasks with log-likelihoods, or use another server.",
            )
        return answer, found

    def _num_tokens(self, context: str) -> int:
        """Of a text alone, with a begin token; asked once for all continuations."""
        if context not in self._context_lengths:
            self._context_lengths[context] = len(self._echo(context)[1].token_logprobs) if context else 0
        return self._context_lengths[context]

    def _windows(self, text: str) -> list[tuple[list[int], int]] | None:
        """Parts of a text that is longer than the context, each with the number of its first tokens that only give context: half of one.
        None for a text that fits, and where the server does not say how long it is.

        Worked example: 10 tokens in a context of 4 -> 0..3, 2..5 of which 2 are seen, 4..7, 6..9.
        """
        try:
            if self._max_model_len is None:
                cards = self._client.get("/v1/models", _Cards).data
                self._max_model_len = next((c.max_model_len for c in cards if c.id == self._served), None) or 0
            if not self._max_model_len or len(text.encode()) < self._max_model_len:
                return None
            body = {"model": self._served, "prompt": text, "add_special_tokens": True}
            token_ids = self._client.post("/tokenize", body, _Tokens).tokens
        except (ConfigError, RequestError):
            return None
        return windows(token_ids, self._max_model_len - 1)


def windows(token_ids: list[int], size: int) -> list[tuple[list[int], int]] | None:
    """See `ServedModel._windows`."""
    if len(token_ids) <= size:
        return None
    step = max(1, size // 2)
    starts = [*range(0, len(token_ids) - size, step), len(token_ids) - size]
    found = [(token_ids[:size], 0)]
    for before, start in pairwise(starts):
        found.append((token_ids[start : start + size], before + size - start))
    return found


def _scored(answer: _Completion, found: _Logprobs, counts: Sequence[bool]) -> Scored:
    """counts: which tokens do. The first token of a model without a begin token has no probability, and adds nothing."""
    tops = found.top_logprobs or [None] * len(found.token_logprobs)
    chosen = [
        (value, max((top or {}).values(), default=value))
        for value, top, is_counted in zip(found.token_logprobs, tops, counts, strict=True)
        if is_counted and value is not None
    ]
    return Scored(
        logprob=sum(value for value, _ in chosen),
        is_greedy=found.top_logprobs is not None and all(value >= best for value, best in chosen),
        prompt_tokens=(answer.usage or _Usage()).prompt_tokens,
    )


def _of_usage(answer: _Completion, text: str) -> Generated:
    usage = answer.usage or _Usage()
    return Generated(text=text, prompt_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)


def _as_text(messages: Sequence[dict[str, Any]]) -> str:
    return "\n\n".join(message["content"] for message in messages)
