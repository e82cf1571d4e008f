"""semantic-kernel's quick starts: the chat completion service, whole and streamed, an agent with a plugin, and text embeddings."""

from typing import Annotated, Literal

import openai
import pytest
from semantic_kernel import Kernel
from semantic_kernel.agents import AgentGroupChat, ChatCompletionAgent, ChatHistoryAgentThread
from semantic_kernel.agents.strategies import DefaultTerminationStrategy
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import (
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
    OpenAITextEmbedding,
)
from semantic_kernel.contents import ChatHistory, FunctionCallContent, FunctionResultContent
from semantic_kernel.functions import KernelArguments, kernel_function

MODEL = "demo_model"


class MenuPlugin:
    """A sample menu plugin."""

    @kernel_function(description="Provides the price of the requested menu item.")
    def get_item_price(
        self, menu_item: Annotated[Literal["soup", "salad"], "The name of the menu item."]
    ) -> Annotated[str, "Returns the price of the menu item."]:
        return "$9.99"


@pytest.fixture
def client(url, key):
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def service(client):
    return OpenAIChatCompletion(ai_model_id=MODEL, async_client=client)


def settings(**options):
    return OpenAIChatPromptExecutionSettings(**({"max_tokens": 12, "seed": 5} | options))


def history():
    history = ChatHistory(system_message="You are a helpful assistant.")
    history.add_user_message("What is the price of the soup?")
    return history


async def test_chat_completion_and_stream(service):
    options = settings(temperature=0.0)
    answer = await service.get_chat_message_content(history(), options)
    assert answer.content and answer.metadata["usage"].completion_tokens <= 12
    chunks = [chunk async for chunk in service.get_streaming_chat_message_content(history(), options)]
    assert "".join(map(str, chunks)) == answer.content
    conversation = history()
    conversation.add_message(answer)
    conversation.add_user_message("And the salad?")
    assert (await service.get_chat_message_content(conversation, options)).finish_reason


@pytest.mark.parametrize("streams", [False, True])
async def test_function_calling(service, streams):
    kernel = Kernel()
    kernel.add_service(service)
    kernel.add_plugin(MenuPlugin(), plugin_name="menu")
    options = settings(
        max_tokens=200,
        parallel_tool_calls=False,
        function_choice_behavior=FunctionChoiceBehavior.Required(auto_invoke=False),
    )
    conversation = history()
    if streams:
        stream = service.get_streaming_chat_message_content(conversation, options, kernel=kernel)
        chunks = [chunk async for chunk in stream]
        message = chunks[0]
        for chunk in chunks[1:]:
            message += chunk
    else:
        message = await service.get_chat_message_content(conversation, options, kernel=kernel)
    (call,) = [item for item in message.items if isinstance(item, FunctionCallContent)]
    assert call.name == "menu-get_item_price"
    result = await kernel.invoke(
        plugin_name="menu", function_name="get_item_price", arguments=KernelArguments(**call.parse_arguments())
    )
    conversation.add_message(message)
    conversation.add_message(
        FunctionResultContent.from_function_call_content_and_result(call, result).to_chat_message_content()
    )
    assert (await service.get_chat_message_content(conversation, settings(), kernel=kernel)).finish_reason


async def test_functions_are_invoked_by_the_kernel(service):
    kernel = Kernel()
    kernel.add_plugin(MenuPlugin(), plugin_name="menu")
    choice = FunctionChoiceBehavior.Required()
    choice.maximum_auto_invoke_attempts = 1
    conversation = history()
    options = settings(max_tokens=200, function_choice_behavior=choice, parallel_tool_calls=False)
    answer = await service.get_chat_message_content(conversation, options, kernel=kernel)
    assert answer.finish_reason
    results = [item for m in conversation.messages for item in m.items if isinstance(item, FunctionResultContent)]
    assert [str(r.result) for r in results] == ["$9.99"]


@pytest.mark.parametrize("streams", [False, True])
async def test_an_agent_with_a_plugin(service, streams):
    agent = ChatCompletionAgent(
        service=service,
        name="Host",
        instructions="Answer questions about the menu.",
        plugins=[MenuPlugin()],
        arguments=KernelArguments(settings=settings(temperature=1.0)),
    )
    thread = ChatHistoryAgentThread()
    for question in ("Hello", "How much does that cost?"):
        if streams:
            async for answer in agent.invoke_stream(messages=question, thread=thread):
                thread = answer.thread
        else:
            answer = await agent.get_response(messages=question, thread=thread)
            thread = answer.thread
        assert answer.message.name == "Host"
    said = [m.role.value async for m in thread.get_messages()]
    assert said == ["user", "assistant", "user", "assistant"]


async def test_a_group_chat_of_named_agents(service):
    agents = [
        ChatCompletionAgent(
            service=service, name=name, instructions=text, arguments=KernelArguments(settings=settings())
        )
        for name, text in (("Writer", "You write."), ("Reviewer", "You review."))
    ]
    chat = AgentGroupChat(agents=agents, termination_strategy=DefaultTerminationStrategy(maximum_iterations=3))
    await chat.add_chat_message("A slogan for a new car.")
    assert [m.name async for m in chat.invoke()] == ["Writer", "Reviewer", "Writer"]


async def test_embeddings(client):
    embedding = OpenAITextEmbedding(ai_model_id=MODEL, async_client=client)
    vectors = await embedding.generate_embeddings(["import os", "x = 1"])
    assert vectors.shape == (2, 256)
