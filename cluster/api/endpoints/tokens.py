"""POST /tokenize and /detokenize, and GET /tokenizer_info, compatible with vLLM: text to token ids and back.

Knows the tokenizer and the chat template; runs nothing on a replica.
"""

import asyncio

from aiohttp import web
from msgspec import UNSET

from cluster.api.context import CONTEXT
from cluster.api.generation.answering import json_response
from cluster.api.generation.conversation import encode_conversation
from cluster.api.generation.prompts import in_thread_if_long
from cluster.api.generation.sampling import check_token_ids
from cluster.api.generation.template_options import note_ignored_by_template, template_options
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from cluster.api.server.body import read_body
from workers.errors import RequestError


async def tokenize(request: web.Request) -> web.Response:
    """The token ids of a prompt or a conversation."""
    api = request.app[CONTEXT]
    body = await read_body(request, TokenizeRequest)
    api = api.serving(body.model)
    if body.model is not None:
        api.check_model(body.model, request[REQUEST_CONTEXT])
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(
            "Exactly one of 'prompt' and 'messages' is required.", remedy="Send either of them.", param="prompt"
        )
    if body.messages is not None:
        note_ignored_by_template(api, body.messages, body, request[REQUEST_CONTEXT])
        prompt = await encode_conversation(
            api,
            body.messages,
            tools=body.tools or (),
            continue_final=bool(body.continue_final_message),
            options=template_options(body),
        )
        token_ids = prompt.token_ids
    else:
        text, adds = body.prompt or "", body.add_special_tokens is not False
        token_ids = await in_thread_if_long(
            len(text), lambda: api.tokenizer.encode_prompt(text, add_special_tokens=adds)
        )
    strings = [api.tokenizer.token_text(i) for i in token_ids] if body.return_token_strs else UNSET
    return json_response(
        TokenizeResponse(
            tokens=token_ids,
            count=len(token_ids),
            max_model_len=api.router.facts.max_model_len,
            token_strs=strings,
        )
    )


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids. Control tokens add nothing."""
    api = request.app[CONTEXT]
    body = await read_body(request, DetokenizeRequest)
    api = api.serving(body.model)
    if body.model is not None:
        api.check_model(body.model, request[REQUEST_CONTEXT])
    check_token_ids(body.tokens, param="tokens", vocab_size=api.router.facts.vocab_size)
    return json_response(DetokenizeResponse(prompt=await asyncio.to_thread(api.tokenizer.decode, body.tokens)))


async def tokenizer_info(request: web.Request) -> web.Response:
    """The tokenizer's settings under the names of transformers, as lm-eval's remote tokenizer reads them. ?model=NAME chooses the model."""
    name = request.query.get("model")
    api = request.app[CONTEXT].serving(name)
    if name is not None:
        api.check_model(name, request[REQUEST_CONTEXT])
    facts, tokenizer, name_of = api.router.facts, api.tokenizer, api.tokenizer.token_text
    return json_response(
        TokenizerInfo(
            # Of every SentencePiece vocabulary of the family; transformers' class for all others.
            tokenizer_class="LlamaTokenizer" if tokenizer.model.kind == "SentencePiece" else "PreTrainedTokenizerFast",
            bos_token=None if tokenizer.bos_token_id is None else name_of(tokenizer.bos_token_id),
            eos_token=name_of(facts.eos_token_ids[0]),
            pad_token=None,
            add_bos_token=tokenizer.adds_bos,
            add_eos_token=tokenizer.adds_eos,
            model_max_length=facts.max_model_len,
            vocab_size=tokenizer.vocab_size,
            chat_template=None if api.chat_template is None else api.chat_template.source,
        )
    )
