"""Turns a body's `response_format`, `structured_outputs` or `guided_*` into the grammar that the output follows.

Knows these fields and what cannot be combined with a grammar. cluster/text/grammar/compiler.py builds the grammars.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from cluster.api.generation.tenant_slots import TenantSlots
from cluster.api.schemas.base import GenerationRequest
from cluster.api.schemas.parsing.structure import check_structure
from cluster.api.schemas.structured import JsonObjectFormat, SchemaFormat, StructuredOutputs
from cluster.text.grammar.compiler import GrammarCompiler, GrammarKind, StructuredOutput
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.protocol import EngineFacts
from workers.thread_priority import QUARTER, lower_priority

TIME_LIMIT_S = 10.0  # the largest grammars within the bounds take 0.8 s
MAX_AT_ONCE = 2
# Older names for a field of structured_outputs.
GUIDED: dict[str, GrammarKind] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


class Grammars:
    """The grammar compiler of one gateway, made at its first use, since reading a vocabulary takes a while.

    It works in daemon threads of low priority: llguidance cannot be interrupted. A grammar that passes every bound and still keeps it
    busy costs its client a response, but does not keep the server from stopping. Such a thread keeps its slot for as long as it runs. A
    tenant (an API key) has one slot at a time, and tenants take turns, so that one tenant's grammars delay only its own requests.
    """

    def __init__(self, tokenizer: Tokenizer, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._tokenizer = tokenizer
        self._time_limit_s = time_limit_s
        self._compiler: GrammarCompiler | None = None
        self._lock = asyncio.Lock()
        self._slots = TenantSlots(MAX_AT_ONCE)

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

    async def compile(
        self, output: StructuredOutput, *, at_start: bool, param: str, facts: EngineFacts, tenant: str | None
    ) -> str:
        """Raises RequestError if no grammar can be built."""
        compiler = await self.compiler(facts)
        build = partial(compiler.compile, output, at_start=at_start, param=param)
        return await self.run(build, param=param, tenant=tenant)

    async def run(self, build: Callable[[], str], *, param: str, tenant: str | None) -> str:
        """Returns what `build` returns. Raises what it raises, and RequestError naming `param` if it takes too long."""
        try:
            async with asyncio.timeout(self._time_limit_s):
                await self._slots.acquire(tenant)
                return await self._in_thread(build, tenant)
        except TimeoutError as e:
            raise RequestError(
                f"{param!r}: building its grammar took more than {self._time_limit_s:g} s.",
                remedy="Simplify it, or try again later.",
                param=param,
            ) from e

    def _in_thread(self, build: Callable[[], str], tenant: str | None) -> "asyncio.Future[str]":
        loop = asyncio.get_running_loop()
        result: asyncio.Future[str] = loop.create_future()

        def deliver(value: str | None, error: Exception | None) -> None:
            self._slots.release(tenant)
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value or "")

        def work() -> None:
            lower_priority(QUARTER)
            value, error = None, None
            try:
                value = build()
            except Exception as e:  # raised in the task that waits
                error = e
            with contextlib.suppress(RuntimeError):  # the loop has been closed in the meantime
                loop.call_soon_threadsafe(deliver, value, error)

        threading.Thread(target=work, name="grammar", daemon=True).start()
        return result


def structured_output(body: GenerationRequest) -> tuple[StructuredOutput, str] | None:
    """The requested form of the output and the field that requests it; None for any text. Raises RequestError."""
    found: list[tuple[StructuredOutput, str]] = []
    if isinstance(body.response_format, JsonObjectFormat | SchemaFormat):
        found.append((_from_response_format(body.response_format), "response_format"))
    if body.structured_outputs is not None:
        found.append((_from_structured_outputs(body.structured_outputs), "structured_outputs"))
    for name, kind in GUIDED.items():
        value = getattr(body, name)
        if value is not None:
            found.append((_output(kind, value, name), name))
    if len(found) > 1:
        raise RequestError(
            f"{found[0][1]!r} and {found[1][1]!r} cannot be combined.",
            remedy="Send only one of them.",
            param=found[1][1],
        )
    return found[0] if found else None


def check_combination(body: GenerationRequest, param: str) -> None:
    """Raises RequestError for parameters that could leave a grammar without a possible token. param: the field with the grammar."""
    for name in ("ignore_eos", "min_tokens", "allowed_token_ids", "bad_words"):
        if getattr(body, name):
            raise RequestError(f"{name!r} cannot be combined with {param!r}.", remedy="Remove one of them.", param=name)


def _from_response_format(wanted: JsonObjectFormat | SchemaFormat) -> StructuredOutput:
    schema = wanted.schema if isinstance(wanted, JsonObjectFormat) else wanted.json_schema.schema
    return StructuredOutput("json_object") if schema is None else StructuredOutput("json", schema)


def _from_structured_outputs(wanted: StructuredOutputs) -> StructuredOutput:
    values: dict[GrammarKind, Any] = {
        "json": wanted.json,
        "regex": wanted.regex,
        "choice": wanted.choice,
        "grammar": wanted.grammar,
        "json_object": wanted.json_object or None,
    }
    given = [(kind, value) for kind, value in values.items() if value is not None]
    if len(given) != 1:
        raise RequestError(
            f"'structured_outputs' has {len(given)} of json, regex, choice, grammar and json_object.",
            remedy="Send exactly one of them.",
            param="structured_outputs",
        )
    return _output(*given[0], "structured_outputs")


def _output(kind: GrammarKind, value: Any, param: str) -> StructuredOutput:
    """A schema may be sent as text."""
    if kind == "json_object":
        return StructuredOutput("json_object")
    if kind == "json" and isinstance(value, str):
        check_structure(value.encode("utf-8", "surrogatepass"))
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise RequestError(f"{param!r}: the schema is not valid JSON.", param=param) from e
        if not isinstance(value, dict | bool):
            raise RequestError(f"{param!r}: the text is not a JSON schema.", param=param)
    return StructuredOutput(kind, value)
