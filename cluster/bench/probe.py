"""What a server takes, found by asking it: token ids or text, `ignore_eos`, token counts in streams, and which ids are ordinary tokens.

Knows OpenAI's endpoints and the /tokenize of vLLM and llama.cpp, which are not the same; knows no server by name.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from cluster.bench.exchange import PATHS, Body, Endpoint, Failure, Outcome, exchange, make_body
from cluster.bench.prompts import WORDS, Prompts
from cluster.bench.transport import Broken, Transport
from workers.errors import ConfigError, ReplicaUnavailableError

_REFUSED = ("HTTP 400", "HTTP 422", "HTTP 501")  # the body, not the client or the moment
_NUM_IDS = 64  # fewer different ids are too few to draw from
_NUM_WORDS = 64


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server as far as a load must know it. name: in messages and reports. fields: more of each body. notes: sentences on what it does
    not take.
    """

    name: str
    model: str
    endpoint: Endpoint
    prompts: Prompts
    ignore_eos: bool
    include_usage: bool
    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def body(self, prompt: "list[int] | str", *, num_output: int) -> Body:
        return make_body(
            prompt,
            num_output=num_output,
            model=self.model,
            endpoint=self.endpoint,
            ignore_eos=self.ignore_eos,
            include_usage=self.include_usage,
            fields=self.fields,
        )


class _Tokens(msgspec.Struct):
    tokens: list[int]


async def probe(
    transport: Transport,
    *,
    name: str,
    model: str,
    endpoint: Endpoint,
    fields: Mapping[str, Any],
    want_text: bool = False,
    vocab_size: int | None = None,
) -> Server:
    """Sends a few requests of one token. want_text: text even where ids are possible. vocab_size: draw ids from the upper part of so many,
    instead of asking /tokenize.

    Raises ReplicaUnavailableError or ConfigError where the server answers none of them.
    """
    ids: tuple[int, ...] | None = None
    if endpoint == "completions" and not want_text:
        ids = _upper_part(vocab_size) if vocab_size is not None else await _ordinary_tokens(transport, model)
    # Those that leave out the least come first.
    options = list(itertools.product((True, False) if ids else (False,), (True, False), (True, False)))
    options.sort(key=sum, reverse=True)
    failure: Failure | None = None
    for takes_ids, ignore_eos, include_usage in options:
        server = Server(
            name=name,
            model=model,
            endpoint=endpoint,
            prompts=Prompts(ids if takes_ids else None),
            ignore_eos=ignore_eos,
            include_usage=include_usage,
            fields=fields,
        )
        outcome = await _ask(transport, server, list(ids[:8]) if takes_ids and ids else " ".join(WORDS[:8]))
        if outcome.failure is None:
            server = replace(server, notes=_notes(server, has_usage=outcome.has_usage, want_text=want_text))
            return server if takes_ids else await _measure_words(transport, server)
        failure = failure or outcome.failure
        if outcome.failure.kind not in _REFUSED:
            failure = outcome.failure
            break
    assert failure is not None
    raise _refusal(failure, name, PATHS[endpoint])


def _notes(server: Server, *, has_usage: bool, want_text: bool) -> tuple[str, ...]:
    notes = []
    if server.prompts.token_ids is None and server.endpoint == "completions" and not want_text:
        notes.append("Prompts are sent as text, so their lengths are approximate.")
    if not server.ignore_eos:
        notes.append("The server refuses `ignore_eos`: answers may be shorter than asked for.")
    if not has_usage:
        notes.append("The server sends no token counts: each event of a stream counts as a token.")
    return tuple(notes)


async def _measure_words(transport: Transport, server: Server) -> Server:
    """The server with prompts whose words are as many tokens as there."""
    counts = []
    for num in (1, 1 + _NUM_WORDS):
        text = " ".join(itertools.islice(itertools.cycle(WORDS), num))
        counts.append((await _ask(transport, server, text)).num_prompt)
    if not 0 < counts[0] < counts[1]:
        note = "The server does not say how long a prompt is: a word is taken for a token."
        return replace(server, notes=(*server.notes, note))
    per_word = (counts[1] - counts[0]) / _NUM_WORDS
    prompts = Prompts(None, tokens_per_word=per_word, num_extra=max(0, round(counts[0] - per_word)))
    return replace(server, prompts=prompts)


async def _ask(transport: Transport, server: Server, prompt: "list[int] | str") -> Outcome:
    """The outcome of a request for one token."""
    now = time.perf_counter()
    outcome = Outcome(now, now, 1)
    await exchange(transport, server.body(prompt, num_output=1), outcome)
    return outcome


async def _ordinary_tokens(transport: Transport, model: str) -> tuple[int, ...] | None:
    """The ids of common words, so that no id is a control token; None where the server has no /tokenize."""
    text = " ".join(WORDS)
    body = {"model": model, "prompt": text, "content": text, "add_special_tokens": False, "add_special": False}
    for fields in (("model", "prompt", "add_special_tokens"), ("content", "add_special")):
        data = await _fetch(transport, "/tokenize", {name: body[name] for name in fields})
        if data is None:
            continue
        try:
            ids = sorted(set(msgspec.json.decode(data, type=_Tokens).tokens))
        except msgspec.DecodeError:
            continue
        if len(ids) >= _NUM_IDS:
            return tuple(ids)
    return None


async def _fetch(transport: Transport, path: str, body: Mapping[str, Any]) -> bytes | None:
    """The whole answer; None where it is not a success."""
    try:
        answer = await transport.post(path, msgspec.json.encode(body))
        try:
            pieces = []
            while (piece := await answer.chunk()) is not None:
                pieces.append(piece[1])
            return b"".join(pieces) if answer.status == 200 else None
        finally:
            answer.close()
    except Broken:
        return None


def _upper_part(vocab_size: int) -> tuple[int, ...]:
    """Control tokens and single bytes have the first ids."""
    return tuple(range(vocab_size // 8, vocab_size))


def _refusal(failure: Failure, name: str, path: str) -> Exception:
    message = f"{failure.message.rstrip('.')}."
    if failure.kind in ("HTTP 401", "HTTP 403"):
        return ConfigError(
            f"The server at {name} refuses this client: {message}",
            remedy="Give a key that may do this with --api-key.",
            param="--api-key",
        )
    if failure.kind == "HTTP 404":
        return ConfigError(
            f"The server at {name} has no {path}, or not this model: {message}",
            remedy="Check --url, --model and --endpoint.",
            param="--url",
        )
    if failure.kind in _REFUSED:
        return ConfigError(
            f"The server at {name} refuses even a request for one token ({failure.kind}): {message}",
            remedy="Check --model, --endpoint and --set.",
        )
    return ReplicaUnavailableError(
        f"The server at {name} does not answer a request for one token ({failure.kind}): {message}",
        remedy="Check that it runs, and --url.",
    )
