"""Chat templates in Jinja, as checkpoints of other families than Mistral's carry them, rendered as transformers renders them.

The template is the operator's: it runs in jinja2's sandbox, as a program that a checkpoint brought along. Messages and tools are the
client's: special tokens in them stay text (special_text.py). Knows no HTTP and no files.
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
_ESCAPED_MARK = re.compile(
    r"(?<!\\)((?:\\\\)*)\\u(fd[de][0-9a-f])"
)  # behind an escaped backslash it is the client's text


class JinjaTemplate:
    """The templates of `files` over one tokenizer. Raises ConfigError for one that is not Jinja, or for ids beyond the model's."""

    supports_prefix = True

    def __init__(self, tokenizer: Tokenizer, files: TemplateFiles, *, model_vocab_size: int) -> None:
        beyond = [content for content, token in files.added_tokens.items() if token.id >= model_vocab_size]
        if beyond:
            raise ConfigError(
                f"The added token {beyond[0]!r} has an id beyond the model's {model_vocab_size} tokens; they do not belong together."
            )
        self._text = SpecialText(tokenizer, files.added_tokens, legacy=files.legacy)
        for name in ("bos_token", "eos_token"):
            if name in files.special_tokens and files.special_tokens[name] not in self._text:
                raise ConfigError(f"The checkpoint names the {name} {files.special_tokens[name]!r} but gives it no id.")
        default = files.templates.get(DEFAULT)
        if default is None:
            raise ConfigError("The checkpoint has several chat templates, but none is named 'default'.")
        self._special_tokens = files.special_tokens
        self._render = _compile(default)
        self._render_with_tools = _compile(files.templates.get(TOOL_USE, default))
        variables = jinja2.meta.find_undeclared_variables(_environment().parse(files.templates.get(TOOL_USE, default)))
        # Calls are read behind Mistral's token; other families' forms of calls are not known here.
        self.supports_tools = "tools" in variables and tokenizer.tool_calls_token_id is not None

    def encode(self, messages: Sequence[Message], *, tools: Sequence[ToolDefinition] = ()) -> ChatPrompt:
        check_conversation(messages)
        if not self.supports_tools and (tools or any(m.tool_calls for m in messages)):
            raise RequestError(
                "This model's chat template has no tools; leave 'tools' and tool calls out.", param="tools"
            )
        texts = [text for m in messages for text in (m.content, m.name or "", m.tool_call_id or "")]
        calls = [call for m in messages for call in m.tool_calls]
        data = [(call.id, call.name, _parse(call.arguments)) for call in calls] + [_as_openai(tool) for tool in tools]
        texts.append(json.dumps(data, ensure_ascii=False))
        mark, end = free_marks(texts, 2)
        conversation = [self._as_template_sees(message, mark) for message in messages]
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
            rendered = _cut_behind(rendered, end)
        try:
            token_ids, num_last = self._text.encode(rendered, mark)
        except RequestError as e:
            raise RequestError(str(e), param="messages") from e
        return ChatPrompt(token_ids, token_ids[len(token_ids) - num_last :] if continues else [])

    def _as_template_sees(self, message: Message, mark: str) -> dict[str, Any]:
        seen: dict[str, Any] = {"role": message.role, "content": self._text.protect(message.content, mark)}
        if message.name is not None:
            seen["name"] = self._text.protect(message.name, mark)
        if message.tool_call_id is not None:
            seen["tool_call_id"] = self._text.protect(message.tool_call_id, mark)
        if message.tool_calls:
            seen["tool_calls"] = [self._call(call, mark) for call in message.tool_calls]
        return seen

    def _call(self, call: ToolCall, mark: str) -> dict[str, Any]:
        arguments, protect = _parse(call.arguments), self._text.protect_json
        function = {
            "name": protect(call.name, mark),
            "arguments": self._text.protect(arguments, mark)
            if isinstance(arguments, str)
            else protect(arguments, mark),
        }
        return {"id": self._text.protect(call.id, mark), "type": "function", "function": function}


def _cut_behind(rendered: str, end: str) -> str:
    """The text up to the end mark; where the template stripped the space behind it, it would have stripped the prefix's own."""
    at = rendered.rfind(end)
    if at < 0:
        raise RequestError(
            "This model's chat template cannot continue a message; leave 'prefix' out.", param="messages"
        )
    return rendered[:at] if rendered[at : at + 2] == f"{end} " else rendered[:at].rstrip()


def _as_openai(tool: ToolDefinition) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _parse(arguments: str) -> Any:
    """Templates write arguments with tojson, and so want a value, not its text."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _compile(source: str) -> Callable[..., str]:
    """A function of the template's variables. Raises ConfigError; the function raises RequestError."""
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ConfigError(f"The chat template is not valid Jinja: line {e.lineno}: {e.message}.") from e

    def render(**variables: Any) -> str:
        try:
            return template.render(**variables)
        except _RaisedByTemplateError as e:
            sentence = _ANY_MARK.sub("", str(e)).split("\n", 1)[0][:300].rstrip(".")
            raise RequestError(f"The conversation does not fit the chat template: {sentence}.", param="messages") from e
        except Exception as e:  # a template is a program: it may fail in any way, and only its request with it
            raise RequestError(
                f"The chat template cannot render this conversation ({type(e).__name__}).", param="messages"
            ) from e

    return render


class _RaisedByTemplateError(jinja2.TemplateError):
    """The template's own words on why it refuses a conversation."""


class _Generation(jinja2.ext.Extension):
    """The {% generation %} block of templates made for training: its body, nothing more."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own way to say it

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
    """As transformers has it: without jinja2's HTML escapes. Marks stay marks."""
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
