"""Microsoft's agent-framework on the Responses API: an agent with a tool, a session that the server keeps, structured output."""

from typing import Annotated, Literal

import pytest
from agent_framework import Agent
from agent_framework.openai import OpenAIChatClient
from pydantic import BaseModel, Field

MODEL = "demo_model"


class City(BaseModel):
    name: Literal["Oslo", "Rome"]


def get_weather(location: Annotated[Literal["Oslo", "Rome"], Field(description="The location.")]) -> str:
    """Get the weather for a given location."""
    return f"The weather in {location} is sunny with a high of 20°C."


@pytest.fixture
def client(url, key):
    return OpenAIChatClient(model=MODEL, base_url=url, api_key=key)


@pytest.mark.parametrize("streams", [False, True])
async def test_an_agent_uses_its_tool(client, streams):
    agent = Agent(client=client, name="Weather", instructions="You are a helpful weather agent.", tools=[get_weather])
    asked = {"max_tokens": 2000, "tool_choice": "required", "allow_multiple_tool_calls": False}
    if streams:
        stream = agent.run("What's the weather like in Oslo?", stream=True, options=asked)
        answer = await stream.get_final_response()
    else:
        answer = await agent.run("What's the weather like in Oslo?", options=asked)
    contents = [content for message in answer.messages for content in message.contents]
    assert {c.name for c in contents if c.type == "function_call"} == {"get_weather"}
    results = [c for c in contents if c.type == "function_result"]
    assert results and all("sunny with a high of 20" in str(result.result) for result in results)


async def test_a_session_is_kept_by_the_server(client):
    agent = Agent(client=client, name="Hello", instructions="You are a friendly assistant.")
    session = agent.create_session()
    first = await agent.run("What is the capital of France?", session=session, options={"max_tokens": 8})
    second = await agent.run("And of Norway?", session=session, options={"max_tokens": 8})
    assert first.text and second.text and session.service_session_id.startswith("resp_")
    assert second.usage_details["input_token_count"] > first.usage_details["input_token_count"]


async def test_structured_output(client):
    agent = Agent(client=client, name="City", instructions="Name a city.")
    answer = await agent.run("Which?", options={"response_format": City, "max_tokens": 100})
    assert answer.value.name in ("Oslo", "Rome")
