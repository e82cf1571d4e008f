"""Anthropic's own client: messages, streams, tools and their results, structured output, counts, stop sequences, errors.

And an agent of semantic-kernel on it, with a plugin.
"""

from typing import Annotated, Literal

import anthropic
import pytest
from semantic_kernel.agents import ChatCompletionAgent, ChatHistoryAgentThread
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.anthropic import AnthropicChatCompletion, AnthropicChatPromptExecutionSettings
from semantic_kernel.contents import FunctionCallContent, FunctionResultContent
from semantic_kernel.functions import KernelArguments, kernel_function

MODEL = "demo_model"
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]


class MenuPlugin:
    """A sample menu plugin."""

    @kernel_function(description="Provides the price of the requested menu item.")
    def get_item_price(
        self, menu_item: Annotated[Literal["soup", "salad"], "The name of the menu item."]
    ) -> Annotated[str, "Returns the price of the menu item."]:
        return "$9.99"


@pytest.fixture
def client(url, key):
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=key, max_retries=0) as client:
        yield client


def create(client, **fields):
    extra = {"seed": 5} | fields.pop("extra_body", {})
    return client.messages.create(model=MODEL, **{"messages": QUESTION, "max_tokens": 12} | fields, extra_body=extra)


def test_a_message_whole_and_streamed(client):
    fields = {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]}
    own = {"extra_body": {"seed": 5, "ignore_eos": True}}
    whole = create(client, **fields, **own)
    assert (whole.stop_reason, whole.usage.output_tokens, whole.role) == ("max_tokens", 12, "assistant")
    with client.messages.stream(model=MODEL, messages=QUESTION, max_tokens=12, **fields, **own) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (whole.content[0].text, whole.stop_reason)
    total = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == total
    assert client.messages.count_tokens(model=MODEL, messages=QUESTION, **fields).input_tokens == total


def test_tools_and_their_results(client):
    fields = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 300}
    whole = create(client, **fields)
    assert whole.stop_reason == "tool_use"
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert calls and all(call.name == "get_weather" and call.input["city"] in ("Oslo", "Rome") for call in calls)
    with client.messages.stream(model=MODEL, messages=QUESTION, extra_body={"seed": 5}, **fields) as stream:
        streamed = stream.get_final_message()
    assert [block.input for block in streamed.content] == [block.input for block in whole.content]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "12 degrees"} for call in calls]
    messages = [
        *QUESTION,
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
    ]
    answer = create(client, messages=messages, tools=[WEATHER], tool_choice={"type": "none"})
    assert [block.type for block in answer.content] == ["text"]


def test_structured_output_stop_sequences_and_prefill(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    answer = create(client, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=100)
    assert answer.content[0].text.replace(" ", "").replace("\n", "") in ('{"n":1}', '{"n":2}')
    prefilled = create(client, messages=[*QUESTION, {"role": "assistant", "content": "It joins"}])
    assert prefilled.content[0].text != create(client).content[0].text
    text = create(client, max_tokens=40).content[0].text
    stop = text[8:11]
    stopped = create(client, max_tokens=40, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == text[: text.index(stop)]


def test_errors(client, url):
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="nobody", messages=QUESTION, max_tokens=1)
    assert caught.value.body["error"]["type"] == "not_found_error"
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    with pytest.raises(anthropic.BadRequestError, match="'image' are not supported"):
        create(client, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.BadRequestError, match="Only functions"):
        create(client, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    stranger = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        create(stranger)


def test_the_clients_own_agent_sends_the_whole_conversation(client):
    """It asks for a conversation that the server keeps, and does without one where that is refused."""

    @anthropic.beta_tool
    def get_weather(city: Literal["Oslo", "Rome"]) -> str:
        """The weather of a city."""
        return f"It is sunny in {city}."

    runner = client.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=300,
        messages=QUESTION,
        tools=[get_weather],
        tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
        max_iterations=2,
        extra_body={"seed": 5},
    )
    first, second = list(runner)
    assert [first.content[0].name, second.content[0].name] == ["get_weather"] * 2
    sizes = [m.usage.input_tokens + m.usage.cache_read_input_tokens for m in (first, second)]
    assert sizes[1] > sizes[0] + 20, "the second request has the first answer and the tool's result too"


async def test_an_agent_of_semantic_kernel_uses_its_plugin(url, key):
    async with anthropic.AsyncAnthropic(base_url=url.removesuffix("/v1"), api_key=key, max_retries=0) as client:
        settings = AnthropicChatPromptExecutionSettings(
            # The schema allows other properties, and the demo model likes to add some before it ends.
            max_tokens=2000,
            function_choice_behavior=FunctionChoiceBehavior.Required(maximum_auto_invoke_attempts=1),
        )
        agent = ChatCompletionAgent(
            service=AnthropicChatCompletion(ai_model_id=MODEL, api_key=key, async_client=client),
            name="Menu",
            instructions="Answer questions about the menu.",
            plugins=[MenuPlugin()],
            arguments=KernelArguments(settings=settings),
        )
        results: list[str] = []
        for _ in range(6):  # the framework refuses a call with other properties, and each answer has a seed of its own
            thread = ChatHistoryAgentThread()
            async for _ in agent.invoke(messages="What does the soup cost?", thread=thread):
                pass
            items = [item async for message in thread.get_messages() for item in message.items]
            assert [item.function_name for item in items if isinstance(item, FunctionCallContent)]
            results += [str(item.result) for item in items if isinstance(item, FunctionResultContent)]
            if any("$9.99" in result for result in results):
                return
    raise AssertionError(results)
