"""AutoGen's quick starts: an assistant with a tool, and a group chat whose agents have names."""

from typing import Literal

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import TextMessage, ToolCallExecutionEvent, ToolCallRequestEvent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import ModelFamily, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient

MODEL = "demo_model"
INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": ModelFamily.UNKNOWN,
}
TOOL_CALLS_TOKEN = 5  # of the demo model's vocabulary


async def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Get the weather for a given city."""
    return f"The weather in {city} is 73 degrees and Sunny."


@pytest.fixture
async def make_model(url, key):
    made = []

    def make(**options):
        options = {"max_tokens": 12, "seed": 5} | options
        model = OpenAIChatCompletionClient(
            model=MODEL, base_url=url, api_key=key, model_info=INFO, max_retries=0, timeout=60, **options
        )
        made.append(model)
        return model

    yield make
    for model in made:
        await model.close()


async def test_create_and_stream(make_model):
    model = make_model(temperature=0)
    answer = await model.create([UserMessage(content="What is the capital of France?", source="user")])
    assert answer.content and answer.usage.completion_tokens <= 12
    pieces = [
        piece
        async for piece in model.create_stream([UserMessage(content="What is the capital of France?", source="user")])
    ]
    assert "".join(pieces[:-1]) == pieces[-1].content == answer.content


@pytest.mark.parametrize("streams", [False, True])
async def test_an_assistant_answers(make_model, streams):
    agent = AssistantAgent(
        name="weather_agent",
        model_client=make_model(),
        tools=[get_weather],
        system_message="You are a helpful assistant.",
        reflect_on_tool_use=True,
        model_client_stream=streams,
    )
    result = await agent.run(task="What is the weather in Oslo?")
    assert isinstance(result, TaskResult) and result.messages[-1].source == "weather_agent"
    again = await agent.run(task="And in Rome?")  # the model's own answer is now part of the conversation
    assert again.messages[-1].source == "weather_agent"


@pytest.mark.parametrize("streams", [False, True])
async def test_an_assistant_uses_its_tool(make_model, streams):
    # The demo model does not choose a tool by itself.
    agent = AssistantAgent(
        name="weather_agent",
        model_client=make_model(max_tokens=300, parallel_tool_calls=False, logit_bias={TOOL_CALLS_TOKEN: 100}),
        tools=[get_weather],
        model_client_stream=streams,
    )
    result = await agent.run(task="What is the weather in Oslo?")
    (requested,) = [m for m in result.messages if isinstance(m, ToolCallRequestEvent)]
    (executed,) = [m for m in result.messages if isinstance(m, ToolCallExecutionEvent)]
    assert requested.content[0].name == "get_weather"
    assert executed.content[0].content.endswith("is 73 degrees and Sunny."), executed
    assert not executed.content[0].is_error


async def test_a_required_tool(make_model):
    tool = FunctionTool(get_weather, description="Get the weather.", strict=True)
    answer = await make_model(max_tokens=200).create(
        [UserMessage(content="Weather?", source="user")], tools=[tool], tool_choice="required"
    )
    assert {call.name for call in answer.content} == {"get_weather"}


@pytest.mark.parametrize("streams", [False, True])
async def test_a_group_chat_of_named_agents(make_model, streams):
    model = make_model(temperature=1)
    agents = [
        AssistantAgent(name, model_client=model, system_message=message, model_client_stream=streams)
        for name, message in (
            ("primary", "You are a helpful AI assistant."),
            ("critic", "Provide constructive feedback. Respond with 'APPROVE' when your feedback is addressed."),
        )
    ]
    team = RoundRobinGroupChat(agents, termination_condition=MaxMessageTermination(5))
    result = await team.run(task="Write a short poem about the fall season.")
    said = [m for m in result.messages if isinstance(m, TextMessage)]
    assert [m.source for m in said] == ["user", "primary", "critic", "primary", "critic"]
    assert "5" in result.stop_reason
