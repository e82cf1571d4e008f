"""POST /v1/chat/completions: answer a conversation with text or with calls of the offered tools.

Knows the endpoint's parameters; conversation.py encodes the prompt, chat_format.py formats the response. The output's text starts
without the space that its first token may have, unless it continues an assistant message with `prefix`.
"""

import time
import uuid
from collections.abc import Sequence
from functools import partial

from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints.chat_format import ChatFormatter
from cluster.api.generation import sampling
from cluster.api.generation.answering import Prepared, answer, check_shape
from cluster.api.generation.conversation import encode_conversation, to_definitions
from cluster.api.generation.generation import Choice, make_choice
from cluster.api.generation.prompts import truncate
from cluster.api.generation.structured import check_combination, structured_output
from cluster.api.generation.template_options import note_ignored_by_template, template_options
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.schemas.chat import (
    ChatCompletion,
    ChatRequest,
    NamedToolChoice,
    Tool,
)
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from cluster.text.chat.template import ChatPrompt
from cluster.text.tools.calls import CallFormat
from cluster.text.tools.definitions import tool_grammar
from workers.errors import RequestError
from workers.protocol import EngineFacts


async def handle(request: web.Request) -> web.StreamResponse:
    """One response, or a stream of chunks."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, ChatRequest)
    api = api.serving(body.model)
    check(api, body, context)
    log_prompt(body.messages)
    prepared = await prepare(api, body, context)
    return await answer(request, api, prepared, deadline=deadline, arrived=arrived)


def check(api: ApiContext, body: ChatRequest, context: RequestContext) -> None:
    """Checks all that needs no replica. Raises RequestError."""
    api.check_model(body.model, context)
    check_shape(api, body, context, num_prompts=1, num_copies=body.n or 1)
    _check_fields(body)
    _check_tools(body)
    _note_ignored(api, body, context)


async def prepare(
    api: ApiContext, body: ChatRequest, context: RequestContext, *, reads_thoughts: bool = True
) -> Prepared:
    """Raises RequestError for what the model cannot do, ReplicaUnavailableError while the model's facts are not known yet.

    reads_thoughts: whether the formatter has a place for what the model thinks; otherwise it is text.
    """
    facts = api.router.facts
    adapter = await api.use_model(body.model, context)
    tools = _offered_tools(body)
    head = ChatCompletion(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=body.model, choices=[])
    keep = body.truncate_prompt_tokens
    prompt = await encode_conversation(
        api,
        body.messages,
        tools=tools,
        safe_prompt=bool(body.safe_prompt),
        continue_final=bool(body.continue_final_message),
        options=template_options(body),
        truncates=keep is not None,
    )
    token_ids = truncate(prompt.token_ids, keep, facts=facts, num_output=_max_tokens(body))
    prompt = ChatPrompt(token_ids, prompt.continues)
    grammar = await _grammar(api, body, tools, at_start=not prompt.continues, facts=facts, tenant=context.tenant)
    choices = _choices(
        api,
        body,
        prompt,
        context,
        grammar=grammar,
        tools=tools,
        facts=facts,
        answer_id=head.id,
        adapter=adapter,
        reads_thoughts=reads_thoughts,
    )
    return Prepared(body=body, choices=choices, formatter=ChatFormatter(api, body, head, choices))


def _check_fields(body: ChatRequest) -> None:
    """Raises RequestError for combinations that make no sense."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs'.", remedy="Set 'logprobs' to true.", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise RequestError(
            "'max_tokens' and 'max_completion_tokens' differ.", remedy="Send only one of them.", param="max_tokens"
        )
    if body.max_tokens == 0 and body.prompt_logprobs is None:
        raise RequestError(
            "'max_tokens' is 0, so the response would be empty.",
            remedy="Send at least 1, or request 'prompt_logprobs'.",
            param="max_tokens",
        )


def _check_tools(body: ChatRequest) -> None:
    """Raises RequestError for tools with equal names, and for a choice of a tool that is not offered."""
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("Two tools have the same name.", remedy="Rename one of them.", param="tools")
    if not tools and choice not in (None, "none", "auto"):
        raise RequestError(
            "'tool_choice' needs 'tools'.", remedy="Send 'tools', or remove 'tool_choice'.", param="tool_choice"
        )
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise RequestError(
            f"'tool_choice' names {choice.function.name!r}, which is not one of the tools.",
            remedy="Name one of the tools.",
            param="tool_choice",
        )


def _note_ignored(api: ApiContext, body: ChatRequest, context: RequestContext) -> None:
    """Fields that can act, but not in this request or with this model's template. Raises RequestError if the server is strict."""
    if not body.tools:
        api.ignore(context, tool_choice=body.tool_choice, parallel_tool_calls=body.parallel_tool_calls)
    elif _must_call(body):
        wanted = structured_output(body)
        api.ignore(context, **({wanted[1]: True} if wanted else {}))
    if not body.logprobs:
        api.ignore(context, top_logprobs=body.top_logprobs)
    note_ignored_by_template(api, body.messages, body, context)


def _offered_tools(body: ChatRequest) -> list[Tool]:
    """The tools the model may call now."""
    return [] if body.tool_choice == "none" else body.tools or []


def _max_tokens(body: ChatRequest) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


async def _grammar(
    api: ApiContext,
    body: ChatRequest,
    tools: Sequence[Tool],
    *,
    at_start: bool,
    facts: EngineFacts,
    tenant: str | None,
) -> str | None:
    """The grammar that the output must follow, as llguidance reads it; None for any text. Raises RequestError."""
    wanted = structured_output(body)
    if not tools:
        if wanted is None:
            return None
        check_combination(body, wanted[1])
        return await api.grammars.compile(wanted[0], at_start=at_start, param=wanted[1], facts=facts, tenant=tenant)
    check_combination(body, "tools")
    compiler = await api.grammars.compiler(facts)
    text = None
    if wanted is not None and not _must_call(body):
        text = await api.grammars.compile(wanted[0], at_start=at_start, param=wanted[1], facts=facts, tenant=tenant)
    build = partial(
        tool_grammar,
        to_definitions(tools),
        compiler=compiler,
        required=_must_call(body),
        name=body.tool_choice.function.name if isinstance(body.tool_choice, NamedToolChoice) else None,
        parallel=body.parallel_tool_calls is not False,
        text=text,
        call_format=_call_format(api),
    )
    return await api.grammars.run(build, param="tools", tenant=tenant)


def _call_format(api: ApiContext) -> CallFormat:
    return "list" if api.chat_template is None else api.chat_template.call_format


def _must_call(body: ChatRequest) -> bool:
    """Whether the response is tool calls and no text."""
    return body.tool_choice in ("required", "any") or isinstance(body.tool_choice, NamedToolChoice)


def _choices(
    api: ApiContext,
    body: ChatRequest,
    prompt: ChatPrompt,
    context: RequestContext,
    *,
    grammar: str | None,
    tools: Sequence[Tool],
    facts: EngineFacts,
    answer_id: str,
    adapter: str | None,
    reads_thoughts: bool,
) -> list[Choice]:
    seed = context.seed_of(body.requested_seed)
    num_tokens = sampling.resolve_max_tokens(
        _max_tokens(body),
        default=sampling.default_chat_tokens(body, api.sampling_defaults),
        num_prompt_tokens=len(prompt.token_ids),
        facts=facts,
        prompt_param="messages",
    )
    choices = []
    call_format = _call_format(api)
    for copy in range(body.n or 1):
        params = sampling.sampling_params(
            body,
            max_tokens=num_tokens,
            seed=sampling.derive_seed(seed, copy),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            grammar=grammar,
            tokenizer=api.tokenizer,
            facts=facts,
            defaults=api.sampling_defaults,
        )
        choices.append(
            make_choice(
                api,
                body,
                context=context,
                answer_id=answer_id,
                index=copy,
                copy=copy,
                prompt_token_ids=prompt.token_ids,
                continues=prompt.continues,
                sampling=params,
                adapter=adapter,
                tool_calls_token_id=api.tokenizer.tool_calls_token_id if tools and call_format != "tags" else None,
                call_tags=bool(tools) and call_format == "tags",
                reads_thoughts=reads_thoughts,
            )
        )
    return choices
