"""POST /tokenize and /detokenize, as vLLM has them: what the model sees of a text, and back.

Knows the tokenizer and the chat template; runs nothing on a replica.
"""

import asyncio

from aiohttp import web
from msgspec import UNSET

from cluster.api.context import GATEWAY
from cluster.api.generation.answering import json_answer
from cluster.api.generation.conversation import encode_conversation
from cluster.api.generation.prompts import in_thread_if_long
from cluster.api.generation.sampling import check_token_ids
from cluster.api.schemas.other import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from cluster.api.server.body import read_body
from workers.errors import RequestError


async def tokenize(request: web.Request) -> web.Response:
    """The ids of a prompt or of a conversation."""
    gateway = request.app[GATEWAY]
    body = await read_body(request, TokenizeRequest)
    if body.model is not None:
        gateway.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Send either 'prompt' or 'messages'.", param="prompt")
    if body.messages is not None:
        prompt = await encode_conversation(gateway, body.messages, tools=body.tools or ())
        token_ids = prompt.token_ids
    else:
        text, bos = body.prompt or "", body.add_special_tokens is not False
        token_ids = await in_thread_if_long(len(text), lambda: gateway.tokenizer.encode(text, bos=bos))
    strings = [gateway.tokenizer.token_text(i) for i in token_ids] if body.return_token_strs else UNSET
    return json_answer(
        TokenizeAnswer(
            tokens=token_ids,
            count=len(token_ids),
            max_model_len=gateway.router.facts.max_model_len,
            token_strs=strings,
        )
    )


async def detokenize(request: web.Request) -> web.Response:
    """The text of some ids; control tokens add nothing."""
    gateway = request.app[GATEWAY]
    body = await read_body(request, DetokenizeRequest)
    if body.model is not None:
        gateway.check_model(body.model)
    check_token_ids(body.tokens, param="tokens", vocab_size=gateway.router.facts.vocab_size)
    return json_answer(DetokenizeAnswer(prompt=await asyncio.to_thread(gateway.tokenizer.decode, body.tokens)))
