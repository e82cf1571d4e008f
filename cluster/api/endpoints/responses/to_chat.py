"""From the body of a response to that of chat, which checks and encodes it, and to what the response repeats of its request.

Knows both bodies' fields. conversation.py makes the messages.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from cluster.api.context import ApiContext
from cluster.api.request_context import RequestContext
from cluster.api.schemas.chat import (
    ChatMessage,
    ChatRequest,
    FunctionChoice,
    NamedToolChoice,
    function_tool,
)
from cluster.api.schemas.responses.request import (
    AllowedTools,
    FunctionToolChoice,
    ResponseInput,
    ResponseRequest,
    TextSchemaFormat,
)
from cluster.api.schemas.structured import JsonSchemaFormat, ResponseFormat, SchemaFormat
from cluster.responses.items import Asked
from workers.errors import RequestError
from workers.protocol import SamplingParams

LOGPROBS = "message.output_text.logprobs"
# Settings of reasoning that ask for what happens anyway: none.
_NO_EFFORT = (None, "none", "minimal")


def shows_logprobs(body: ResponseRequest) -> bool:
    return LOGPROBS in (body.include or ())


def chat_request(body: ResponseRequest, messages: Sequence[ChatMessage]) -> ChatRequest:
    """Raises RequestError for a choice of tools that are not offered."""
    return ChatRequest(
        messages=list(messages),
        stream=bool(body.stream),
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=True if shows_logprobs(body) else None,
        top_logprobs=body.top_logprobs if shows_logprobs(body) else None,
        seed=body.seed,
        stop=body.stop,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        priority=body.priority,
        user=body.user,
        **prompt_fields(body),
    )


def prompt_fields(body: ResponseInput) -> dict[str, Any]:
    """The fields of chat, other than the messages, that decide the prompt and the form of the answer. Raises RequestError."""
    tools, choice = body.tools or [], body.tool_choice
    if isinstance(choice, AllowedTools):
        allowed = [tool.name for tool in choice.tools]
        missing = set(allowed) - {tool.name for tool in tools}
        if missing:
            raise RequestError(
                f"'tool_choice' allows {min(missing)!r}, which is not one of the tools.",
                remedy="Name one of the tools.",
                param="tool_choice",
            )
        tools = [tool for tool in tools if tool.name in allowed]
    return {
        "model": body.model,
        "tools": [function_tool(t.name, t.parameters, description=t.description, strict=t.strict) for t in tools]
        or None,
        "tool_choice": NamedToolChoice(function=FunctionChoice(name=choice.name))
        if isinstance(choice, FunctionToolChoice)
        else choice.mode
        if isinstance(choice, AllowedTools)
        else choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body),
    }


def note_ignored(api: ApiContext, body: ResponseRequest, context: RequestContext) -> None:
    """Notes fields that have no effect. Raises RequestError if the server is strict."""
    note_ignored_input(api, body, context)
    others = [name for name in body.include or () if name != LOGPROBS]
    api.ignore(context, **({"include": others} if others else {}))
    if not shows_logprobs(body):
        api.ignore(context, top_logprobs=body.top_logprobs)
    if not body.stream:
        api.ignore(context, stream_options=body.stream_options)


def note_ignored_input(api: ApiContext, body: ResponseInput, context: RequestContext) -> None:
    """The same for what decides the prompt."""
    reasoning, text = body.reasoning, body.text
    if reasoning is not None:
        effort = None if reasoning.effort in _NO_EFFORT else reasoning.effort
        summary = reasoning.summary or reasoning.generate_summary
        api.ignore(context, **{"reasoning.effort": effort, "reasoning.summary": summary})
    if text is not None:
        api.ignore(context, **{"text.verbosity": text.verbosity})


def asked(body: ResponseRequest, params: SamplingParams, *, store: bool) -> Asked:
    """What the response repeats. params: with the defaults filled in."""
    reasoning, text = body.reasoning, body.text
    return Asked(
        model=body.model,
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        background=bool(body.background),
        store=store,
        max_output_tokens=body.max_output_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_logprobs=body.top_logprobs or 0,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        tool_choice=msgspec.to_builtins(body.tool_choice or "auto"),
        tools=[msgspec.to_builtins(tool) for tool in body.tools or []],
        text={
            "format": msgspec.to_builtins(text.format)
            if text is not None and text.format is not None
            else {"type": "text"},
            "verbosity": "medium",
        },
        reasoning={"effort": None if reasoning is None else reasoning.effort, "summary": None},
        truncation=body.truncation or "disabled",
        metadata=body.metadata or {},
        user=body.user,
    )


def _format(body: ResponseInput) -> ResponseFormat | None:
    given = None if body.text is None else body.text.format
    if isinstance(given, TextSchemaFormat):
        return SchemaFormat(
            json_schema=JsonSchemaFormat(
                name=given.name, schema=given.schema, description=given.description, strict=given.strict
            )
        )
    return given
