"""A model of an OpenAI-compatible server, asked for answers, for log-probabilities of given texts, and for verdicts on others' answers.

Knows the requests and answers of /v1/chat/completions and /v1/completions; no suites and no scores.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from cluster.cli.client import Client
from cluster.eval.run import Generated
from cluster.eval.suite import Item
from workers.errors import RequestError

JUDGE_PROMPT = (
    "You check an answer. Reply with the word yes or the word no, and nothing else.\n\n"
    "Question to the model:\n{question}\n\nIts answer:\n{answer}\n\n{criterion}"
)


class _Message(msgspec.Struct):
    content: str | None = None


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] = []
    text_offset: list[int] = []


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


class ServedModel:
    """See `cluster.eval.run.Model` and `Judge`: one model of one server, asked by chat, or by text for a model without a chat template."""

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

    def generate(self, item: Item) -> Generated:
        body = {"model": self._served, "max_tokens": item.max_tokens, "temperature": 0.0, "seed": 0, **self._fields}
        if self._uses_chat:
            answer = self._client.post("/v1/chat/completions", {**body, "messages": list(item.messages)}, _Completion)
            message = answer.choices[0].message if answer.choices else None
            text = (message.content or "") if message is not None else ""
        else:
            answer = self._client.post("/v1/completions", {**body, "prompt": _as_text(item.messages)}, _Completion)
            text = answer.choices[0].text if answer.choices else ""
        usage = answer.usage or _Usage()
        return Generated(text=text, prompt_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)

    def logprob(self, item: Item, option: str) -> float:
        prompt = _as_text(item.messages)
        prompt += "" if prompt[-1:].isspace() else " "
        body = {"model": self._served, "prompt": prompt + option, "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = self._client.post("/v1/completions", body, _Completion)
        found = answer.choices[0].logprobs if answer.choices else None
        if found is None or len(found.token_logprobs) != len(found.text_offset):
            raise RequestError("The server gives no log-probabilities of a prompt, which `choice` needs.")
        # A token may join the space with the beginning of the option.
        after = len(prompt.rstrip())
        pairs = zip(found.token_logprobs, found.text_offset, strict=True)
        return sum(value for value, offset in pairs if value is not None and offset >= after)

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


def _as_text(messages: Sequence[dict[str, Any]]) -> str:
    return "\n\n".join(message["content"] for message in messages)
