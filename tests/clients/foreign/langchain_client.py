"""langchain-openai as an application uses it: chat, streams, tools, structured output, embeddings and plain completions."""

import os
from typing import Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

MODEL = "demo_model"
QUESTION = [SystemMessage("Be brief."), HumanMessage("What does os.path.join do?")]


class Animal(BaseModel):
    """An animal."""

    name: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=9)


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@pytest.fixture
def make_chat(url, key):
    def make(**options):
        return ChatOpenAI(model=MODEL, base_url=url, api_key=key, max_retries=0, timeout=60, seed=5, **options)

    return make


def test_invoke_and_stream(make_chat):
    chat = make_chat(max_tokens=12, temperature=0.7, stream_usage=True)
    answer = chat.invoke(QUESTION)
    assert isinstance(answer, AIMessage) and answer.content
    assert answer.usage_metadata["output_tokens"] <= 12
    chunks = list(chat.stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == answer.content
    assert whole.usage_metadata["total_tokens"] == answer.usage_metadata["total_tokens"]
    assert whole.response_metadata["finish_reason"] == answer.response_metadata["finish_reason"]


async def test_ainvoke_astream_and_batch(make_chat):
    chat = make_chat(max_tokens=10)
    answer = await chat.ainvoke("hello")
    assert "".join([chunk.content async for chunk in chat.astream("hello")]) == answer.content
    answers = await chat.abatch(["hello", "import os"])
    assert answers[0].content == answer.content
    assert len(answers) == 2


def test_logprobs_stop_and_n(make_chat):
    answer = make_chat(max_tokens=6, temperature=0, logprobs=True, top_logprobs=2).invoke("hello")
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    text = make_chat(max_tokens=30, temperature=0).invoke("hello").content
    stopped = make_chat(max_tokens=30, temperature=0, stop=[text[5:8]]).invoke("hello")
    assert stopped.content == text[: text.index(text[5:8])]
    generated = make_chat(max_tokens=6, n=2, temperature=1).generate([[HumanMessage("hello")]])
    assert len(generated.generations[0]) == 2


def test_bind_tools_and_feed_the_result_back(make_chat):
    chat = make_chat(max_tokens=200)
    bound = chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    answer = bound.invoke(QUESTION)
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Oslo", "Rome")
    assert answer.invalid_tool_calls == []
    chunks = list(bound.stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [("get_weather", call["args"])]
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    follow_up = make_chat(max_tokens=6).bind_tools([get_weather]).invoke([*QUESTION, answer, result])
    assert follow_up.response_metadata["finish_reason"]
    named = chat.bind_tools([get_weather], tool_choice="get_weather", strict=True).invoke(QUESTION)
    assert {c["name"] for c in named.tool_calls} == {"get_weather"}


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output(make_chat, method, strict):
    chat = make_chat(max_tokens=200, temperature=1)
    value = chat.with_structured_output(Animal, method=method, strict=strict).invoke(QUESTION)
    assert isinstance(value, Animal)
    document = chat.with_structured_output(Animal, method=method, strict=strict, include_raw=True).invoke(QUESTION)
    assert document["parsing_error"] is None and document["parsed"] == value


def test_embeddings_as_text_and_through_a_tokenizer(url, key):
    options = {"model": MODEL, "base_url": url, "api_key": key, "max_retries": 0}
    text = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    vectors = text.embed_documents(["import os", "x = 1"])
    assert [len(v) for v in vectors] == [256, 256]
    assert text.embed_query("x = 1") == pytest.approx(vectors[1], abs=1e-5)
    # The default splits long texts and averages the results. tiktoken would need a download, so transformers counts tokens.
    chunked = OpenAIEmbeddings(
        **options,
        tiktoken_enabled=False,
        tiktoken_model_name=os.environ["TRAMONTANE_TOKENIZER"],
        embedding_ctx_length=50,
    )
    short, long = chunked.embed_documents(["x = 1", "x = 1\n" * 100])
    assert len(short) == len(long) == 256 and short != long


async def test_async_embeddings(url, key):
    embeddings = OpenAIEmbeddings(model=MODEL, base_url=url, api_key=key, check_embedding_ctx_length=False)
    assert len(await embeddings.aembed_query("x")) == 256


def test_plain_completions(url, key):
    llm = OpenAI(model=MODEL, base_url=url, api_key=key, max_retries=0, max_tokens=8, temperature=0, seed=1)
    text = llm.invoke("def fibonacci(n):")
    assert text and "".join(llm.stream("def fibonacci(n):")) == text
    first, second = llm.generate(["def fibonacci(n):", "import os"]).generations
    assert first[0].text == text != second[0].text


def test_errors_reach_the_application(make_chat, url):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        make_chat(temperature=3).invoke("hello")
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(model=MODEL, base_url=url, api_key="no", max_retries=0).invoke("hello")
