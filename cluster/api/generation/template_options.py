"""From a body's options for the chat template to what the template gets: chat and /tokenize have the same ones.

Knows vLLM's names for them, and which of them a template does not read. conversation.py encodes the messages.
"""

from collections.abc import Sequence

from cluster.api.context import ApiContext
from cluster.api.request_context import RequestContext
from cluster.api.schemas.chat import ChatMessage, ChatRequest, ToolMessage
from cluster.api.schemas.parsing.lenient import path_of
from cluster.api.schemas.tokens import TokenizeRequest
from cluster.text.chat.template import TemplateOptions
from workers.errors import RequestError


def template_options(body: ChatRequest | TokenizeRequest) -> TemplateOptions:
    """Raises RequestError for options that exclude each other."""
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            "'continue_final_message' and 'add_generation_prompt' cannot be combined.",
            remedy="Set only one of them to true.",
            param="add_generation_prompt",
        )
    return TemplateOptions(
        add_generation_prompt=body.add_generation_prompt is not False, variables=body.chat_template_kwargs or {}
    )


def note_ignored_by_template(
    api: ApiContext, messages: Sequence[ChatMessage], body: ChatRequest | TokenizeRequest, context: RequestContext
) -> None:
    """Notes what the model's chat template does not read. Raises RequestError if the server is strict."""
    template = api.chat_template
    if template is None:
        return
    unread = [name for name in body.chat_template_kwargs or {} if not template.reads(name)]
    api.ignore(context, **{path_of("chat_template_kwargs", name): True for name in unread})
    if not template.reads("add_generation_prompt"):
        api.ignore(context, add_generation_prompt=body.add_generation_prompt)
    # A tool's name is in the call that it answers.
    named = any(message.name is not None for message in messages if not isinstance(message, ToolMessage))
    if named and not template.reads("name"):
        api.ignore(context, **{"messages[].name": True})
