"""Microsoft's agent-framework and its quick starts: an agent with a tool, its session, a workflow of two agents, structured output."""

from typing import Annotated, Literal

import pytest
from agent_framework import Agent, AgentExecutor, WorkflowBuilder
from agent_framework.openai import OpenAIChatCompletionClient, OpenAIEmbeddingClient
from pydantic import BaseModel, Field

MODEL = "demo_model"


class City(BaseModel):
    name: Literal["Oslo", "Rome"]


def get_weather(location: Annotated[Literal["Oslo", "Rome"], Field(description="The location.")]) -> str:
    """Get the weather for a given location."""
    return f"The weather in {location} is sunny with a high of 20°C."


@pytest.fixture
def client(url, key):
    return OpenAIChatCompletionClient(model=MODEL, base_url=url, api_key=key)


def options(**changes):
    return {"max_tokens": 12, "seed": 5} | changes


async def test_an_agent_answers_and_streams(client):
    agent = Agent(
        client=client, name="HelloAgent", instructions="You are a friendly assistant. Keep your answers brief."
    )
    answer = await agent.run("What is the capital of France?", options=options(temperature=0))
    assert answer.text and answer.usage_details["output_token_count"] <= 12
    chunks = [
        chunk
        async for chunk in agent.run("What is the capital of France?", stream=True, options=options(temperature=0))
    ]
    assert "".join(chunk.text or "" for chunk in chunks) == answer.text


@pytest.mark.parametrize("streams", [False, True])
async def test_an_agent_uses_its_tool(client, streams):
    agent = Agent(
        client=client, name="WeatherAgent", instructions="You are a helpful weather agent.", tools=[get_weather]
    )
    asked = options(max_tokens=200, tool_choice="required", allow_multiple_tool_calls=False)
    if streams:
        stream = agent.run("What's the weather like in Oslo?", stream=True, options=asked)
        answer = await stream.get_final_response()
    else:
        answer = await agent.run("What's the weather like in Oslo?", options=asked)
    contents = [content for message in answer.messages for content in message.contents]
    calls = [content for content in contents if content.type == "function_call"]
    results = [content for content in contents if content.type == "function_result"]
    assert {call.name for call in calls} == {"get_weather"}
    assert results and all("sunny with a high of 20" in str(result.result) for result in results)


async def test_a_session_remembers(client):
    agent = Agent(client=client, name="ConversationAgent", instructions="You are a friendly assistant.")
    session = agent.create_session()
    first = await agent.run("My name is Alice and I love hiking.", session=session, options=options(temperature=0))
    second = await agent.run("What do you remember about me?", session=session, options=options(temperature=0))
    assert second.usage_details["input_token_count"] > first.usage_details["input_token_count"]


async def test_structured_output(client):
    agent = Agent(client=client, name="CityAgent", instructions="You name cities.")
    answer = await agent.run("A city?", options=options(max_tokens=100, response_format=City))
    assert answer.value.name in ("Oslo", "Rome")


async def test_a_workflow_of_two_agents(client):
    writer, reviewer = (
        AgentExecutor(Agent(client=client, name=name, instructions=text, default_options=options()))
        for name, text in (("writer", "You create new content."), ("reviewer", "You review the writer's content."))
    )
    workflow = WorkflowBuilder(start_executor=writer).add_edge(writer, reviewer).build()
    events = await workflow.run("Create a slogan for a new electric SUV.")
    assert len(events.get_outputs()) >= 1


async def test_embeddings(url, key):
    embeddings = await OpenAIEmbeddingClient(model=MODEL, base_url=url, api_key=key).get_embeddings(
        ["x = 1", "import os"]
    )
    assert [len(e.vector) for e in embeddings] == [256, 256]
