"""Chat templates in Jinja, which checkpoints of other model families include, rendered as transformers renders them.

A template is a program from the checkpoint, so it runs in jinja2's sandbox. Messages and tools come from the client: special tokens in
them stay text (special_text.py). Knows no HTTP and no files.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from cluster.text.chat.special_text import SpecialText, free_marks
from cluster.text.chat.template import ChatPrompt, Message, check_conversation
from cluster.text.chat.template_files import DEFAULT, TOOL_USE, TemplateFiles
from cluster.text.tokenizer import Tokenizer
from cluster.text.tools.definitions import ToolCall, ToolDefinition
from workers.errors import ConfigError, RequestError

_ANY_MARK = re.compile("[\ufdd0-\ufdef]")
# After an escaped backslash it is the client's text.
_ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fd[de][0-9a-f])")


class JinjaTemplate:
    """The templates of `files` with one tokenizer. Raises ConfigError for invalid Jinja, or for token ids the model does not have."""

    supports_prefix = True

    def __init__(self, tokenizer: Tokenizer, files: TemplateFiles, *, model_vocab_size: int) -> None:
        beyond = [content for content, token in files.added_tokens.items() if token.id >= model_vocab_size]
        if beyond:
            raise ConfigError(
                f"The id of the added token {beyond[0]!r} is beyond the model's {model_vocab_size} tokens.",
                remedy="Use the tokenizer files that belong to the model.",
            )
        self._text = SpecialText(tokenizer, files.added_tokens, legacy=files.legacy)
        for name in ("bos_token", "eos_token"):
            if name in files.special_tokens and files.special_tokens[name] not in self._text:
                raise ConfigError(
                    f"The checkpoint names the {name} {files.special_tokens[name]!r} but does not give its id."
                )
        default = files.templates.get(DEFAULT)
        if default is None:
            raise ConfigError("The checkpoint has several chat templates, but none is named 'default'.")
        self._special_tokens = files.special_tokens
        self._render = _compile(default)
        self._render_with_tools = _compile(files.templates.get(TOOL_USE, default))
        variables = jinja2.meta.find_undeclared_variables(_environment().parse(files.templates.get(TOOL_USE, default)))
        # Only Mistral's format of tool calls, after its control token, can be read.
        self.supports_tools = "tools" in variables and tokenizer.tool_calls_token_id is not None

    def encode(self, messages: Sequence[Message], *, tools: Sequence[ToolDefinition] = ()) -> ChatPrompt:
        check_conversation(messages)
        if not self.supports_tools and (tools or any(m.tool_calls for m in messages)):
            raise RequestError(
                "This model's chat template does not support tools.",
                remedy="Remove 'tools' and tool calls from the request.",
                param="tools",
            )
        texts = [text for m in messages for text in (m.content, m.name or "", m.tool_call_id or "")]
        calls = [call for m in messages for call in m.tool_calls]
        data = [(call.id, call.name, _parse(call.arguments)) for call in calls] + [_as_openai(tool) for tool in tools]
        texts.append(json.dumps(data, ensure_ascii=False))
        mark, end = free_marks(texts, 2)
        conversation = [self._for_template(message, mark) for message in messages]
        definitions = [self._text.protect_json(_as_openai(tool), mark) for tool in tools]
        continues = messages[-1].prefix
        if continues:
            conversation[-1]["content"] += f"{end} "
        render = self._render_with_tools if tools else self._render
        rendered = render(
            messages=conversation,
            tools=definitions or None,
            documents=None,
            add_generation_prompt=not continues,
            **self._special_tokens,
        )
        if continues:
            rendered = _cut_at(rendered, end)
        try:
            token_ids, num_last = self._text.encode(rendered, mark)
        except RequestError as e:
            raise RequestError(e.message, remedy=e.remedy, param="messages") from e
        return ChatPrompt(token_ids, token_ids[len(token_ids) - num_last :] if continues else [])

    def _for_template(self, message: Message, mark: str) -> dict[str, Any]:
        converted: dict[str, Any] = {"role": message.role, "content": self._text.protect(message.content, mark)}
        if message.name is not None:
            converted["name"] = self._text.protect(message.name, mark)
        if message.tool_call_id is not None:
            converted["tool_call_id"] = self._text.protect(message.tool_call_id, mark)
        if message.tool_calls:
            converted["tool_calls"] = [self._call(call, mark) for call in message.tool_calls]
        return converted

    def _call(self, call: ToolCall, mark: str) -> dict[str, Any]:
        arguments, protect = _parse(call.arguments), self._text.protect_json
        function = {
            "name": protect(call.name, mark),
            "arguments": self._text.protect(arguments, mark)
            if isinstance(arguments, str)
            else protect(arguments, mark),
        }
        return {"id": self._text.protect(call.id, mark), "type": "function", "function": function}


def _cut_at(rendered: str, end: str) -> str:
    """The text up to the end mark. If the template stripped the space after the mark, it would also strip the prefix's own space."""
    at = rendered.rfind(end)
    if at < 0:
        raise RequestError(
            "This model's chat template cannot continue a message.",
            remedy="Remove 'prefix' from the request.",
            param="messages",
        )
    return rendered[:at] if rendered[at : at + 2] == f"{end} " else rendered[:at].rstrip()


def _as_openai(tool: ToolDefinition) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _parse(arguments: str) -> Any:
    """Templates write arguments with tojson, so they need the value, not its JSON text."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _compile(source: str) -> Callable[..., str]:
    """A function that renders the template from its variables and raises RequestError. Raises ConfigError for invalid Jinja."""
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ConfigError(f"The chat template is not valid Jinja: line {e.lineno}: {e.message}.") from e

    def render(**variables: Any) -> str:
        try:
            return template.render(**variables)
        except _RaisedByTemplateError as e:
            reason = _ANY_MARK.sub("", str(e)).split("\n", 1)[0][:300].rstrip(".")
            raise RequestError(f"The conversation does not fit the chat template: {reason}.", param="messages") from e
        except Exception as e:  # a template is a program that may fail in any way; only this request fails
            raise RequestError(
                f"The chat template cannot render this conversation ({type(e).__name__}).", param="messages"
            ) from e

    return render


class _RaisedByTemplateError(jinja2.TemplateError):
    """Raised by the template itself, with its reason to reject a conversation."""


class _Generation(jinja2.ext.Extension):
    """The {% generation %} block of templates made for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 requires this form

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: without the HTML escapes of jinja2. Marks are not escaped."""
    written = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPED_MARK.sub(lambda m: m[1] + chr(int(m[2], 16)), written) if ensure_ascii else written


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise _RaisedByTemplateError(message)

    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
