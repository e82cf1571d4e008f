"""Tokens that are parts of characters, over HTTP: /tokenize, /detokenize, /tokenizer_info, streams, and the bytes of log-probabilities."""

import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.checkpoints.gguf_files import write_gguf
from support.fakes.replica import FakeReplica, tokens
from support.vocabularies.gguf_vocabulary import byte_level_metadata
from support.vocabularies.tekken import write_tekken
from support.vocabularies.tokenizers import write_tokenizer

from cluster.api.app import make_app
from cluster.router.router import Router
from cluster.text.chat.jinja_template import JinjaTemplate
from cluster.text.chat.template_files import DEFAULT, TemplateFiles
from cluster.text.tokenizer import Tokenizer, load_tokenizer

TEXT = " 日本🦜 ᚠ it's 42"


@pytest.fixture(scope="module", params=["llama3", "smollm2", "tekken", "gguf"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tekken":
        write_tekken(folder, "v3")
    elif request.param == "gguf":
        write_gguf(folder / "x.gguf", dtype="F32", metadata=byte_level_metadata("llama-bpe"))
    else:
        write_tokenizer(folder, request.param)
    return load_tokenizer(folder)


@pytest.fixture
async def client(tokenizer: Tokenizer) -> AsyncIterator[TestClient]:
    replica = FakeReplica(tokens(tokenizer.encode(TEXT, bos=False)))
    template = JinjaTemplate(
        tokenizer, TemplateFiles({DEFAULT: "{{ messages[0].content }}"}), model_vocab_size=tokenizer.vocab_size
    )
    router = Router([replica], max_inflight_requests=4)
    app = make_app(router=router, tokenizer=tokenizer, chat_template=template, model_name="m")
    async with contextlib.AsyncExitStack() as stack:
        yield await stack.enter_async_context(TestClient(TestServer(app)))


async def test_tokenize_and_detokenize(client: TestClient, tokenizer: Tokenizer) -> None:
    answer = await (await client.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True})).json()
    assert answer["tokens"] == tokenizer.encode_prompt(TEXT)
    assert answer["token_strs"] == [tokenizer.token_text(i) for i in answer["tokens"]]
    assert any(text.startswith("<0x") for text in answer["token_strs"]), (
        "the text needs parts of characters to test them"
    )
    back = await (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"prompt": TEXT}


async def test_the_facts_of_the_tokenizer(client: TestClient, tokenizer: Tokenizer) -> None:
    answer = await (await client.get("/tokenizer_info")).json()
    assert answer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert answer["bos_token"] == tokenizer.pieces.names[tokenizer.bos_token_id or 0]
    assert (answer["vocab_size"], answer["add_bos_token"]) == (tokenizer.vocab_size, tokenizer.adds_bos)


async def test_the_bytes_of_a_streams_log_probabilities_are_its_text(client: TestClient, tokenizer: Tokenizer) -> None:
    num = len(tokenizer.encode(TEXT, bos=False))
    body = {"model": "m", "prompt": "x", "max_tokens": num, "logprobs": 1, "stream": True, "echo": False}
    response = await client.post("/v1/completions", json=body)
    blocks = [block[6:] for block in (await response.text()).split("\n\n") if block.startswith("data: {")]
    choices = [choice for block in blocks for choice in json.loads(block)["choices"]]
    pieces = [choice["text"] for choice in choices]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces), "a client sees whole characters only"
    shown = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    assert shown == [tokenizer.token_text(i) for i in tokenizer.encode(TEXT, bos=False)]
    offsets = [at for choice in choices if choice["logprobs"] for at in choice["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[-1] < len(TEXT)


async def test_the_bytes_of_an_answers_log_probabilities_are_its_text(client: TestClient, tokenizer: Tokenizer) -> None:
    num = len(tokenizer.encode(TEXT, bos=False))
    question = [{"role": "user", "content": "x"}]
    body = {"model": "m", "messages": question, "max_tokens": num, "logprobs": True, "top_logprobs": 2}
    answer = await (await client.post("/v1/chat/completions", json=body)).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == TEXT
    listed = choice["logprobs"]["content"]
    assert bytes(b for token in listed for b in token["bytes"]) == TEXT.encode()
    assert [token["top_logprobs"][0]["bytes"] for token in listed] == [token["bytes"] for token in listed]
