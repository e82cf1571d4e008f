"""The endpoints that lines of batches may call: the body of each, its check, and its answer.

Knows which code reads and answers which body. Keys, retries and results are the executor's business (line_executor.py).
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.api.context import ApiContext
from cluster.api.endpoints import chat, completions, embeddings
from cluster.api.endpoints.messages import create as messages
from cluster.api.endpoints.responses import line as responses
from cluster.api.generation import answering
from cluster.api.generation.answering import Prepared
from cluster.api.request_context import RequestContext
from cluster.api.schemas.chat import ChatRequest
from cluster.api.schemas.completions import CompletionRequest
from cluster.api.schemas.embeddings import EmbeddingRequest
from cluster.api.schemas.messages.request import MessageRequest
from cluster.api.schemas.parsing.parse import parse
from cluster.api.schemas.responses.request import ResponseRequest, name_items
from workers.errors import RequestError

Answer = Callable[[ApiContext, Any, RequestContext], Awaitable[msgspec.Struct]]


@dataclass(frozen=True, kw_only=True)
class LineEndpoint:
    """`body`: its struct. `check`: all that can be checked without a replica. `answer`: from a checked body to the response.

    `adapt`: see schemas/parsing/parse.py.
    """

    body: type[msgspec.Struct]
    check: Callable[[ApiContext, Any, RequestContext], object]
    answer: Answer
    adapt: Callable[[dict[str, Any]], None] | None = None

    def read(self, api: ApiContext, data: bytes, context: RequestContext) -> Any:
        """The checked body. Raises RequestError."""
        body: Any
        body, ignored = parse(data, self.body, strict=api.strict, adapt=self.adapt)
        context.ignored.extend(ignored)
        self.check(api.serving(body.model), body, context)
        if getattr(body, "stream", None):
            raise RequestError(
                "A line of a batch cannot be streamed.", remedy="Remove 'stream' from the line's body.", param="stream"
            )
        if body.priority is not None and body.priority < 0:
            raise RequestError(
                f"'priority' is {body.priority}; in a batch it orders the batch's lines only and cannot be negative.",
                remedy="Send 0 or more.",
                param="priority",
            )
        return body


def _generate(prepare: Callable[[ApiContext, Any, RequestContext], Awaitable[Prepared]]) -> Answer:
    async def answer(api: ApiContext, body: Any, context: RequestContext) -> msgspec.Struct:
        return await answering.complete(api, await prepare(api, body, context), arrived=time.monotonic())

    return answer


async def _embed(api: ApiContext, body: Any, context: RequestContext) -> msgspec.Struct:
    return await embeddings.complete(api, body, context, arrived=time.monotonic())


LINE_ENDPOINTS: Mapping[str, LineEndpoint] = {
    "/v1/completions": LineEndpoint(
        body=CompletionRequest, check=completions.check, answer=_generate(completions.prepare)
    ),
    "/v1/chat/completions": LineEndpoint(body=ChatRequest, check=chat.check, answer=_generate(chat.prepare)),
    "/v1/embeddings": LineEndpoint(body=EmbeddingRequest, check=embeddings.check, answer=_embed),
    "/v1/responses": LineEndpoint(
        body=ResponseRequest, check=responses.check, answer=_generate(responses.prepare), adapt=name_items
    ),
    "/v1/messages": LineEndpoint(body=MessageRequest, check=messages.check, answer=_generate(messages.prepare)),
}
