"""Chat templates in Jinja, which checkpoints of other model families include, rendered as transformers renders them.

Messages and tools come from the client: special tokens in them stay text (special_tokens.py). A message of several text parts is given to
the template as a list if it can read one, otherwise as one text with the parts on lines of their own, as in vLLM. Knows no HTTP, no files
and no Jinja (jinja_environment.py).
"""

import json
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from cluster.text.chat.jinja_environment import compile_template, names_in, undeclared_variables
from cluster.text.chat.probe import probe
from cluster.text.chat.template import (
    DEFAULT_OPTIONS,
    ChatPrompt,
    Message,
    TemplateOptions,
    check_conversation,
    check_tools,
)
from cluster.text.chat.template_files import DEFAULT, TOOL_USE, TemplateFiles
from cluster.text.special_tokens import free_marks
from cluster.text.tokenizer import Tokenizer
from cluster.text.tools.calls import CallFormat
from cluster.text.tools.definitions import ToolCall, ToolDefinition, mistral_id
from cluster.text.tools.named_calls import ARGS, CALLS
from cluster.text.tools.tagged_calls import OPEN
from workers.errors import ConfigError, RequestError

log = logging.getLogger(__name__)


class JinjaTemplate:
    """The templates of `files` with one tokenizer.

    Raises ConfigError for a template that cannot be compiled, that fails on a plain question, or that writes tokens without an id.
    """

    supports_prefix = True

    def __init__(self, tokenizer: Tokenizer, files: TemplateFiles, *, model_vocab_size: int) -> None:
        default = files.templates.get(DEFAULT)
        if default is None:
            raise ConfigError("The checkpoint has several chat templates, but none is named 'default'.")
        with_tools = files.templates.get(TOOL_USE, default)
        self.source: str | None = default
        self._tokenizer = tokenizer
        self._text = tokenizer.special_tokens
        self._render = compile_template(default)
        self._render_with_tools = compile_template(with_tools)
        self._special_tokens = _special_tokens(tokenizer)
        _check_tokens(tokenizer, self._special_tokens, (default, with_tools), model_vocab_size=model_vocab_size)
        abilities = probe(
            partial(self._render, **self._special_tokens), partial(self._render_with_tools, **self._special_tokens)
        )
        self._forms = abilities.forms
        self._short_call_ids = abilities.short_call_ids
        call_format = _call_format(tokenizer, with_tools)
        self.call_format: CallFormat = call_format or "list"
        self.supports_tools = call_format is not None and "tools" in undeclared_variables(with_tools)
        if self.supports_tools and abilities.tool_fault is not None:
            log.warning("Tools are off: the chat template fails on a tool call: %s", abilities.tool_fault)
            self.supports_tools = False
        self._names = names_in(default) | names_in(with_tools)

    def reads(self, name: str) -> bool:
        return name in self._names

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolDefinition] = (),
        options: TemplateOptions = DEFAULT_OPTIONS,
    ) -> ChatPrompt:
        check_conversation(messages)
        check_tools(messages, tools, supported=self.supports_tools)
        texts = [text for m in messages for text in (*m.texts, m.name or "", m.tool_call_id or "")]
        calls = [call for m in messages for call in m.tool_calls]
        data = [(call.id, call.name, _parse(call.arguments)) for call in calls] + [_as_openai(tool) for tool in tools]
        texts.append(json.dumps([*data, dict(options.variables)], ensure_ascii=False))
        mark, end = free_marks(texts, 2)
        continues = messages[-1].prefix
        conversation = [self._for_template(message, mark) for message in messages]
        if continues:
            conversation[-1] = self._for_template(messages[-1], mark, end=f"{end} ")
        definitions = [self._text.protect_json(_as_openai(tool), mark) for tool in tools]
        render = self._render_with_tools if tools else self._render
        own = {
            "messages": conversation,
            "tools": definitions or None,
            "documents": None,
            "add_generation_prompt": options.add_generation_prompt and not continues,
            **self._special_tokens,
        }
        taken = next((name for name in options.variables if name in own), None)
        if taken is not None:
            raise RequestError(
                f"'chat_template_kwargs' cannot set {taken!r}, which the server sets.",
                remedy="Remove it.",
                param="chat_template_kwargs",
            )
        rendered = render(**self._text.protect_json(dict(options.variables), mark), **own)
        if continues:
            rendered = _cut_at(rendered, end)
        try:
            token_ids, num_last = self._tokenizer.encode_rendered(rendered, mark=mark)
        except RequestError as e:
            raise RequestError(e.message, remedy=e.remedy, param="messages") from e
        return ChatPrompt(token_ids, token_ids[len(token_ids) - num_last :] if continues else [])

    def _for_template(self, message: Message, mark: str, *, end: str = "") -> dict[str, Any]:
        """end: added to the content, which then is one text."""
        protect = partial(self._text.protect, mark=mark)
        converted: dict[str, Any] = {"role": message.role, "content": self._content(message, mark, end=end)}
        if message.name is not None:
            converted["name"] = protect(message.name)
        if message.tool_call_id is not None:
            converted["tool_call_id"] = protect(self._call_id(message.tool_call_id))
        if message.tool_calls:
            converted["tool_calls"] = [self._call(call, mark) for call in message.tool_calls]
        return converted

    def _content(self, message: Message, mark: str, *, end: str) -> str | list[dict[str, str]]:
        form = self._forms.get(message.role, "text")
        if form == "text" or (form != "parts" and (end or len(message.texts) < 2)):
            return self._text.protect("\n".join(message.texts), mark) + end
        texts = [self._text.protect(text, mark) for text in message.texts] or [""]
        texts[-1] += end
        return [{"type": "text", "text": text} for text in texts]

    def _call(self, call: ToolCall, mark: str) -> dict[str, Any]:
        arguments, protect = _parse(call.arguments), self._text.protect_json
        function = {
            "name": protect(call.name, mark),
            "arguments": self._text.protect(arguments, mark)
            if isinstance(arguments, str)
            else protect(arguments, mark),
        }
        return {"id": self._text.protect(self._call_id(call.id), mark), "type": "function", "function": function}

    def _call_id(self, call_id: str) -> str:
        return mistral_id(call_id) if self._short_call_ids else call_id


def _call_format(tokenizer: Tokenizer, source: str) -> CallFormat | None:
    """By what the template writes, and what the vocabulary has; None for a format that is not read."""
    if tokenizer.tool_calls_token_id is not None and (CALLS in source or OPEN not in source):
        return "names" if ARGS in source and tokenizer.control_token_id(ARGS) is not None else "list"
    return "tags" if OPEN in source else None


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The template's variables: the checkpoint's own tokens, otherwise the vocabulary's."""
    names = tokenizer.pieces.names
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    own = {key: names[token_id] for key, token_id in ids.items() if token_id is not None}
    return own | tokenizer.settings.special_tokens


def _check_tokens(
    tokenizer: Tokenizer, special_tokens: dict[str, str], sources: Sequence[str], *, model_vocab_size: int
) -> None:
    """Raises ConfigError if a template writes a token that the model or the vocabulary lacks."""
    variables = {name for source in sources for name in undeclared_variables(source)}
    used = {special_tokens[name] for name in variables if name in special_tokens}
    for content, token in tokenizer.settings.added_tokens.items():
        if token.id >= model_vocab_size and (content in used or any(content in source for source in sources)):
            raise ConfigError(
                f"The chat template writes the token {content!r}, whose id {token.id} is beyond the model's "
                f"{model_vocab_size} tokens.",
                remedy="Use the tokenizer files that belong to the model.",
            )
    for name in ("bos_token", "eos_token"):
        content = special_tokens.get(name, "")
        if content and content not in tokenizer.special_tokens:
            raise ConfigError(
                f"The checkpoint names the {name} {content!r} but does not give its id.",
                remedy="Add it to added_tokens_decoder in tokenizer_config.json.",
            )


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
