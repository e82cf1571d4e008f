"""From a body's `response_format` and `structured_outputs` to the grammar its output follows.

Knows the two fields and what cannot be combined with a grammar. Grammars themselves are cluster/text/grammar/compiler.py's.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from cluster.api.schemas.base import GenerationRequest
from cluster.api.schemas.parse import check_structure
from cluster.api.schemas.structured import JsonObjectFormat, SchemaFormat, StructuredOutputs
from cluster.text.grammar.compiler import GrammarCompiler, StructuredOutput
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.protocol import EngineFacts

TIME_LIMIT_S = 10.0  # the largest that the bounds let through take 0.8 s
MAX_AT_ONCE = 2


class Grammars:
    """The compiler of one gateway, made at its first use: a vocabulary takes a while to read in.

    It works in threads that nothing waits for: llguidance cannot be interrupted, and a grammar that got past every bound and keeps it
    busy shall cost its sender an answer, not the server its end. Such a thread keeps its turn for as long as it runs.
    """

    def __init__(self, tokenizer: Tokenizer, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._tokenizer = tokenizer
        self._time_limit_s = time_limit_s
        self._compiler: GrammarCompiler | None = None
        self._lock = asyncio.Lock()
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def compiler(self, facts: EngineFacts) -> GrammarCompiler:
        async with self._lock:
            if self._compiler is None:
                self._compiler = await asyncio.to_thread(
                    GrammarCompiler,
                    self._tokenizer,
                    vocab_size=facts.vocab_size,
                    eos_token_ids=facts.eos_token_ids,
                )
        return self._compiler

    async def compile(self, output: StructuredOutput, *, at_start: bool, param: str, facts: EngineFacts) -> str:
        """Raises RequestError for what no grammar can be made of."""
        compiler = await self.compiler(facts)
        return await self.run(partial(compiler.compile, output, at_start=at_start, param=param), param=param)

    async def run(self, build: Callable[[], str], *, param: str) -> str:
        """What `build` returns. Raises what it raises, and RequestError naming `param` when it takes too long."""
        try:
            async with asyncio.timeout(self._time_limit_s):
                await self._turns.acquire()
                return await self._in_thread(build)
        except TimeoutError as e:
            raise RequestError(
                f"{param}: no grammar could be made of it in {self._time_limit_s:g} s; make it simpler, or try again later.",
                param=param,
            ) from e

    def _in_thread(self, build: Callable[[], str]) -> "asyncio.Future[str]":
        loop = asyncio.get_running_loop()
        result: asyncio.Future[str] = loop.create_future()

        def deliver(value: str | None, error: Exception | None) -> None:
            self._turns.release()
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value or "")

        def work() -> None:
            value, error = None, None
            try:
                value = build()
            except Exception as e:  # handed to whoever waits
                error = e
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(deliver, value, error)

        threading.Thread(target=work, name="grammar", daemon=True).start()
        return result


def structured_output(body: GenerationRequest) -> tuple[StructuredOutput, str] | None:
    """What the output shall look like and the field that says so; None for any text. Raises RequestError."""
    wishes: list[tuple[StructuredOutput, str]] = []
    if isinstance(body.response_format, JsonObjectFormat):
        wishes.append((StructuredOutput("json_object", None), "response_format"))
    elif isinstance(body.response_format, SchemaFormat):
        schema = body.response_format.json_schema.schema
        wish = StructuredOutput("json_object", None) if schema is None else StructuredOutput("json", schema)
        wishes.append((wish, "response_format"))
    if body.structured_outputs is not None:
        wishes.append((_from_structured_outputs(body.structured_outputs), "structured_outputs"))
    if len(wishes) > 1:
        raise RequestError(
            "'response_format' and 'structured_outputs' both ask for a form of output; send one of them.",
            param="structured_outputs",
        )
    return wishes[0] if wishes else None


def check_combination(body: GenerationRequest, param: str) -> None:
    """Raises RequestError for parameters that could leave a grammar without a possible token. param: what asks for the grammar."""
    for name in ("ignore_eos", "min_tokens", "allowed_token_ids", "bad_words"):
        if getattr(body, name):
            raise RequestError(f"{name!r} cannot be combined with {param!r}; leave one of them out.", param=name)


def _from_structured_outputs(wanted: StructuredOutputs) -> StructuredOutput:
    given: list[tuple[Any, Any]] = [
        (kind, value)
        for kind, value in (
            ("json", wanted.json),
            ("regex", wanted.regex),
            ("choice", wanted.choice),
            ("grammar", wanted.grammar),
        )
        if value is not None
    ]
    if len(given) != 1:
        raise RequestError(
            f"'structured_outputs' needs exactly one of json, regex, choice and grammar, not {len(given)}.",
            param="structured_outputs",
        )
    kind, value = given[0]
    if kind == "json" and isinstance(value, str):
        check_structure(value.encode("utf-8", "surrogatepass"))
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise RequestError("'structured_outputs.json' is not valid JSON.", param="structured_outputs") from e
        if not isinstance(value, dict | bool):
            raise RequestError("'structured_outputs.json' must be a JSON schema.", param="structured_outputs")
    return StructuredOutput(kind, value)
