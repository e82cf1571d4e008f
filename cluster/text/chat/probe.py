"""Finds out what a Jinja template can do, by rendering small conversations with it when it is loaded.

A template that fails on a plain question is found here, not by every request. Knows templates as functions of messages; knows no tokens
and no files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.text.chat.jinja_environment import RaisedByTemplateError, reason_of
from workers.errors import ConfigError, RequestError

Role = Literal["system", "user", "assistant"]
Form = Literal["text", "text or parts", "parts"]
_FIRST, _SECOND = "alpha", "beta"
_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
MISTRAL_CALL_ID, OPENAI_CALL_ID = "abcDEF123", "call_abcDEF123abcDEF123"


@dataclass(frozen=True, slots=True)
class Abilities:
    """forms: by role, whether the content may be a text, a list of parts, or must be a list. tool_fault: why tools fail, None if they work.

    short_call_ids: the template accepts only Mistral's tool call ids, of 9 characters.
    """

    forms: Mapping[str, Form]
    tool_fault: str | None
    short_call_ids: bool = False


def probe(render: Callable[..., str], render_with_tools: Callable[..., str]) -> Abilities:
    """Raises ConfigError for a template that cannot render a single question, alone or after a system message."""
    forms = {role: _form(render, role) for role in ("system", "user", "assistant")}
    user = forms["user"]
    question = {"role": "user", "content": _content(user)}
    if _fault(render, [question]) is not None:
        rule = {"role": "system", "content": _content(forms["system"])}
        fault = _fault(render, [question])
        if _fault(render, [rule, question]) is not None:
            raise ConfigError(f"The chat template fails on a plain question: {fault}.")
    faults = {
        call_id: _fault(render_with_tools, _tool_conversation(question, call_id), tools=[_TOOL])
        for call_id in (OPENAI_CALL_ID, MISTRAL_CALL_ID)
    }
    return Abilities(
        forms=forms,
        tool_fault=faults[MISTRAL_CALL_ID],
        short_call_ids=faults[OPENAI_CALL_ID] is not None and faults[MISTRAL_CALL_ID] is None,
    )


def _form(render: Callable[..., str], role: str) -> Form:
    """By what is written: both parts, and not Python's or JSON's form of the list."""
    text, parts = (_written(render, _conversation(role, content)) for content in (_FIRST, _parts()))
    takes_parts = parts is not None and _FIRST in parts and _SECOND in parts and not _shows_list(parts)
    if not takes_parts:
        return "text"
    return "text or parts" if text is not None and _FIRST in text else "parts"


def _conversation(role: str, content: Any) -> list[dict[str, Any]]:
    probed = {"role": role, "content": content}
    # The other messages are in the same form: a template for parts may take nothing else.
    other = {"role": "user", "content": "x" if isinstance(content, str) else [{"type": "text", "text": "x"}]}
    return {"system": [probed, other], "assistant": [other, probed, other]}.get(role, [probed])


def _tool_conversation(question: dict[str, Any], call_id: str) -> list[dict[str, Any]]:
    call = {"id": call_id, "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    return [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1", "name": "add", "tool_call_id": call_id},
    ]


def _parts() -> list[dict[str, str]]:
    return [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]


def _content(form: Form) -> Any:
    return _parts() if form == "parts" else _FIRST


def _shows_list(written: str) -> bool:
    return "'type'" in written or '"type"' in written


def _written(render: Callable[..., str], messages: list[dict[str, Any]]) -> str | None:
    try:
        return render(messages=messages, tools=None, documents=None, add_generation_prompt=True)
    except RequestError:
        return None


def _fault(
    render: Callable[..., str], messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None
) -> str | None:
    try:
        render(messages=messages, tools=tools, documents=None, add_generation_prompt=True)
    except RequestError as e:
        cause = e.__cause__
        kind = "" if isinstance(cause, RaisedByTemplateError) else f"{type(cause).__name__}: "
        return f"{kind}{reason_of(cause)}"
    return None
