"""One request from its body to its outcome: when each token came, how many there were, or why there is no whole answer.

Knows the two endpoints that stream text. Times are the transport's clock. Every failure becomes part of the outcome; nothing is raised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import msgspec

from cluster.bench.events import DONE, Splitter, Usage, error_message, read_event
from cluster.bench.transport import Answer, Broken, Transport

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_MAX_REFUSAL_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Failure:
    """kind: a few words by which failures are counted, such as "HTTP 429"."""

    kind: str
    message: str
    retry_after_s: float | None = None


@dataclass(slots=True)
class Outcome:
    """asked_s: where the request's clock begins: its scheduled time in an open loop, otherwise when it was sent. times_s: of the events
    with tokens. num_output: as the server's usage says, or else the number of these events. wanted_output: as asked for.
    """

    asked_s: float
    sent_s: float
    wanted_output: int
    times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    num_prompt: int = 0
    num_output: int = 0
    has_usage: bool = False
    failure: Failure | None = None

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.asked_s

    @property
    def e2e_s(self) -> float:
        """To the last token."""
        return self.times_s[-1] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times_s)]

    @property
    def mean_gap_s(self) -> float | None:
        """Seconds for each token after the first; None for a single token."""
        if self.num_output < 2:
            return None
        return (self.times_s[-1] - self.times_s[0]) / (self.num_output - 1)


@dataclass(frozen=True, slots=True)
class Body:
    """What to send, encoded ahead, so that the load itself does not wait for it."""

    path: str
    data: bytes
    num_output: int


def make_body(
    prompt: "list[int] | str",
    *,
    num_output: int,
    model: str,
    endpoint: Endpoint,
    ignore_eos: bool,
    include_usage: bool,
    fields: Mapping[str, Any],
) -> Body:
    """fields: more of the body; they win over what is set here."""
    body: dict[str, Any] = {"model": model, "max_tokens": num_output, "temperature": 0, "stream": True}
    if endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if ignore_eos:
        body["ignore_eos"] = True
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    return Body(PATHS[endpoint], msgspec.json.encode(body | dict(fields)), num_output)


async def exchange(transport: Transport, body: Body, outcome: Outcome) -> None:
    """Fills `outcome` as the answer comes, so that what a canceled request saw is not lost. `ended_s` is left to the caller."""
    answer: Answer | None = None
    try:
        answer = await transport.post(body.path, body.data)
        if answer.status != 200:
            outcome.failure = await _refusal(answer)
        else:
            await _read(answer, outcome)
    except Broken as e:
        outcome.failure = Failure(e.kind, e.message)
    finally:
        if answer is not None:
            answer.close()


async def _read(answer: Answer, outcome: Outcome) -> None:
    splitter = Splitter()
    usage: Usage | None = None
    is_done = has_ended = False
    while (piece := await answer.chunk()) is not None:
        received_s, data = piece
        for text in splitter.feed(data):
            if text == DONE:
                is_done = True
                continue
            try:
                event = read_event(text)
            except msgspec.DecodeError as e:
                outcome.failure = Failure("not a stream of chunks", f"{e}: {text[:100].decode(errors='replace')}")
                return
            if event.error is not None:
                outcome.failure = Failure("error in the stream", event.error)
                return
            if event.has_tokens:
                outcome.times_s.append(received_s)
            usage = event.usage or usage
            has_ended = has_ended or event.is_last_choice
    outcome.num_output = len(outcome.times_s)
    if usage is not None and usage.completion_tokens is not None:
        outcome.num_prompt, outcome.num_output, outcome.has_usage = usage.prompt_tokens, usage.completion_tokens, True
    if not (is_done or has_ended):
        outcome.failure = Failure("stream ended early", "the server closed the stream before its end")
    elif not outcome.times_s:
        outcome.failure = Failure("no tokens", "the answer has no tokens")


async def _refusal(answer: Answer) -> Failure:
    data = b""
    while (piece := await answer.chunk()) is not None and len(data) < _MAX_REFUSAL_BYTES:
        data += piece[1]
    return Failure(f"HTTP {answer.status}", error_message(data), _retry_after_s(answer.headers.get("retry-after")))


def _retry_after_s(text: str | None) -> float | None:
    """Seconds; None for a date, which no server for models is known to send."""
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None
