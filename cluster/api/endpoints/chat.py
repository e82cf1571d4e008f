"""POST /v1/chat/completions: a conversation, answered with text or with calls of the tools it offers.

Knows the endpoint's parameters and answer shape; the prompt is conversation.py's. The answer's text opens without the space its first
token may carry, unless it continues an assistant message with `prefix`.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from cluster.api.context import GATEWAY, Gateway
from cluster.api.generation import sampling
from cluster.api.generation.answering import Prepared, answer, check_shape
from cluster.api.generation.conversation import encode_conversation, to_definitions
from cluster.api.generation.generation import Choice, Event, Whole, make_choice, usage
from cluster.api.generation.logprobs import render_chat, render_prompt
from cluster.api.generation.origin import HTTP, Origin
from cluster.api.generation.prompts import truncate
from cluster.api.generation.structured import check_combination, structured_output
from cluster.api.schemas.base import PromptLogprobs
from cluster.api.schemas.chat import (
    AnsweredFunction,
    AnsweredToolCall,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatRequest,
    FunctionDelta,
    NamedToolChoice,
    Tool,
    ToolCallDelta,
)
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from cluster.text.chat.template import ChatPrompt
from cluster.text.output.output import OutputStep
from cluster.text.tools.calls import ToolCallDelta as CallPiece
from cluster.text.tools.definitions import tool_grammar
from workers.errors import RequestError
from workers.protocol import EngineFacts, FinishReason


async def handle(request: web.Request) -> web.StreamResponse:
    """One answer, or a stream of chunks."""
    gateway = request.app[GATEWAY]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, ChatRequest)
    check(gateway, body)
    log_prompt(body.messages)
    prepared = await prepare(gateway, body)
    return await answer(request, gateway, prepared, deadline=deadline, arrived=arrived)


def check(gateway: Gateway, body: ChatRequest) -> None:
    """As far as that needs no replica. Raises RequestError."""
    gateway.check_model(body.model)
    check_shape(gateway, body, num_prompts=1, num_copies=body.n or 1)
    _check_fields(body)
    _check_tools(body)


async def prepare(gateway: Gateway, body: ChatRequest, origin: Origin = HTTP) -> Prepared:
    """Raises RequestError for what the model cannot do, ReplicaUnavailableError while no replica has told what it can."""
    facts = gateway.router.facts
    tools = _offered_tools(body)
    head = ChatCompletion(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=body.model, choices=[])
    keep = body.truncate_prompt_tokens
    prompt = await encode_conversation(
        gateway, body.messages, tools=tools, safe_prompt=bool(body.safe_prompt), truncates=keep is not None
    )
    token_ids = truncate(prompt.token_ids, keep, facts=facts, num_output=_max_tokens(body))
    prompt = ChatPrompt(token_ids, prompt.continues)
    grammar = await _grammar(gateway, body, tools, at_start=not prompt.continues, facts=facts)
    choices = _choices(gateway, body, prompt, origin, grammar=grammar, tools=tools, facts=facts, answer_id=head.id)
    return Prepared(body=body, choices=choices, wording=_Wording(gateway, body, head, choices))


def _check_fields(body: ChatRequest) -> None:
    """Raises RequestError for what makes no sense together."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise RequestError("'max_tokens' and 'max_completion_tokens' differ; send one of them.", param="max_tokens")
    if body.max_tokens == 0 and body.prompt_logprobs is None:
        raise RequestError(
            "'max_tokens' is 0, so there would be no answer; send at least 1, or ask for 'prompt_logprobs'.",
            param="max_tokens",
        )


def _check_tools(body: ChatRequest) -> None:
    """Raises RequestError for a choice among none, or of one that is not there."""
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("Two tools have the same name; rename one.", param="tools")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("'tool_choice' needs 'tools' to choose from.", param="tool_choice")
        if body.parallel_tool_calls is not None:
            raise RequestError("'parallel_tool_calls' needs 'tools'.", param="parallel_tool_calls")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise RequestError(
            f"'tool_choice' names {choice.function.name!r}, which is none of the tools.", param="tool_choice"
        )


def _offered_tools(body: ChatRequest) -> list[Tool]:
    """The tools the model may call now."""
    return [] if body.tool_choice == "none" else body.tools or []


def _max_tokens(body: ChatRequest) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


async def _grammar(
    gateway: Gateway, body: ChatRequest, tools: Sequence[Tool], *, at_start: bool, facts: EngineFacts
) -> str | None:
    """What the output must look like, in llguidance's words; None for anything. Raises RequestError."""
    wanted = structured_output(body)
    if tools:
        if wanted is not None:
            raise RequestError(
                f"{wanted[1]!r} cannot be combined with tools; leave one of them out, or set 'tool_choice' to 'none'.",
                param=wanted[1],
            )
        check_combination(body, "tools")
        compiler = await gateway.grammars.compiler(facts)
        named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedToolChoice) else None
        build = partial(
            tool_grammar,
            to_definitions(tools),
            compiler=compiler,
            required=body.tool_choice == "required" or named is not None,
            name=named,
            parallel=body.parallel_tool_calls is not False,
        )
        return await gateway.grammars.run(build, param="tools")
    if wanted is None:
        return None
    check_combination(body, wanted[1])
    return await gateway.grammars.compile(wanted[0], at_start=at_start, param=wanted[1], facts=facts)


def _choices(
    gateway: Gateway,
    body: ChatRequest,
    prompt: ChatPrompt,
    origin: Origin,
    *,
    grammar: str | None,
    tools: Sequence[Tool],
    facts: EngineFacts,
    answer_id: str,
) -> list[Choice]:
    seed = origin.seed_of(body.seed)
    num_tokens = sampling.resolve_max_tokens(
        _max_tokens(body), default=None, num_prompt_tokens=len(prompt.token_ids), facts=facts, prompt_param="messages"
    )
    choices = []
    for copy in range(body.n or 1):
        params = sampling.sampling_params(
            body,
            max_tokens=num_tokens,
            seed=sampling.derive_seed(seed, copy),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            grammar=grammar,
            tokenizer=gateway.tokenizer,
            facts=facts,
        )
        choices.append(
            make_choice(
                gateway,
                body,
                origin=origin,
                answer_id=answer_id,
                index=copy,
                copy=copy,
                prompt_token_ids=prompt.token_ids,
                continues=prompt.continues,
                sampling=params,
                tool_calls_token_id=gateway.tokenizer.tool_calls_token_id if tools else None,
            )
        )
    return choices


@dataclass
class _Wording:
    gateway: Gateway
    body: ChatRequest
    head: ChatCompletion
    choices: Sequence[Choice]
    _opened: set[int] = field(default_factory=set)

    def whole(self, wholes: Sequence[Whole]) -> ChatCompletion:
        finished = []
        for whole in wholes:
            calls = _join_calls(whole.steps)
            message = ChatAnswer(content=None if calls and not whole.text else whole.text, tool_calls=calls or UNSET)
            finished.append(
                ChatChoice(
                    index=whole.choice.index,
                    message=message,
                    logprobs=render_chat(self.gateway.tokenizer, whole.logprobs) if self.body.logprobs else None,
                    finish_reason=_finish_reason(whole.choice, whole.choice.output.finish_reason),
                    token_ids=whole.token_ids if self.body.return_token_ids else UNSET,
                )
            )
        return msgspec.structs.replace(
            self.head,
            choices=finished,
            usage=usage(self.choices),
            prompt_logprobs=self._prompt_logprobs(),
            prompt_token_ids=self._prompt_token_ids(),
        )

    def chunks(self, event: Event) -> Iterator[ChatChunk]:
        choice, step = event.choice, event.step
        index = choice.index
        token_ids = event.token_ids if self.body.return_token_ids else UNSET
        if index not in self._opened:
            first = not self._opened
            self._opened.add(index)
            yield self._chunk(
                ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")),
                prompt_logprobs=self._prompt_logprobs() if first else UNSET,
                prompt_token_ids=self._prompt_token_ids() if first else UNSET,
            )
        if step.text or step.logprobs or (token_ids and not step.tool_calls):
            logprobs = render_chat(self.gateway.tokenizer, step.logprobs) if self.body.logprobs else None
            delta = ChatDelta(content=step.text)
            yield self._chunk(ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, token_ids=token_ids))
            token_ids = [] if self.body.return_token_ids else UNSET
        if step.tool_calls:
            delta = ChatDelta(tool_calls=[_call_delta(call) for call in step.tool_calls])
            yield self._chunk(ChatChunkChoice(index=index, delta=delta, token_ids=token_ids))
        if step.finish_reason is not None:
            reason = _finish_reason(choice, step.finish_reason)
            yield self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason))

    def last_chunks(self) -> Iterator[ChatChunk]:
        if self.body.include_usage:
            yield ChatChunk(
                id=self.head.id,
                created=self.head.created,
                model=self.head.model,
                choices=[],
                usage=usage(self.choices),
            )

    def _chunk(
        self,
        part: ChatChunkChoice,
        *,
        prompt_logprobs: PromptLogprobs | UnsetType = UNSET,
        prompt_token_ids: list[int] | UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self.head.id,
            created=self.head.created,
            model=self.head.model,
            choices=[part],
            usage=usage(self.choices) if self.body.continuous_usage else None,
            prompt_logprobs=prompt_logprobs,
            prompt_token_ids=prompt_token_ids,
        )

    def _prompt_logprobs(self) -> PromptLogprobs | UnsetType:
        if self.body.prompt_logprobs is None:
            return UNSET
        entries = next((c.prompt_logprobs for c in self.choices if c.prompt_logprobs), [])
        return render_prompt(self.gateway.tokenizer, entries, num_top=self.body.prompt_logprobs)

    def _prompt_token_ids(self) -> list[int] | UnsetType:
        return self.choices[0].request.prompt_token_ids if self.body.return_token_ids else UNSET


def _finish_reason(choice: Choice, reason: FinishReason | None) -> str | None:
    return "tool_calls" if reason is FinishReason.STOP and choice.output.called_tools else reason


def _join_calls(steps: Sequence[OutputStep]) -> list[AnsweredToolCall]:
    """The calls whose pieces the steps hold."""
    ids: dict[int, str] = {}
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    for call in (call for step in steps for call in step.tool_calls):
        if call.id is not None:
            ids[call.index] = call.id
        if call.name is not None:
            names[call.index] = call.name
        arguments.setdefault(call.index, []).append(call.arguments)
    return [
        AnsweredToolCall(id=ids[i], function=AnsweredFunction(name=names[i], arguments="".join(arguments[i])))
        for i in sorted(ids)
    ]


def _call_delta(piece: CallPiece) -> ToolCallDelta:
    opens = piece.id is not None
    return ToolCallDelta(
        index=piece.index,
        id=piece.id,
        type="function" if opens else None,
        function=FunctionDelta(name=piece.name, arguments=piece.arguments),
    )
