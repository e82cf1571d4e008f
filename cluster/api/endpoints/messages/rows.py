"""The rows of /v1/messages in the table of endpoints."""

from cluster.api.endpoints.endpoint import BODY_ERRORS, MODEL_ERRORS, RUN_ERRORS, Endpoint
from cluster.api.endpoints.messages import create
from cluster.api.schemas.messages.request import MessagePrompt, MessageRequest
from cluster.api.schemas.messages.response import Message, MessageEvent, TokenCount

MESSAGES = (
    Endpoint(
        method="POST",
        path="/v1/messages",
        handler=create.handle,
        summary="Answer a conversation, as Anthropic's clients speak it.",
        body=MessageRequest,
        response=Message,
        chunk=MessageEvent,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, *RUN_ERRORS),
    ),
    Endpoint(
        method="POST",
        path="/v1/messages/count_tokens",
        handler=create.count_tokens,
        summary="Count the tokens of a conversation.",
        body=MessagePrompt,
        response=TokenCount,
        errors=(*BODY_ERRORS, *MODEL_ERRORS, 429, 503),
    ),
)
