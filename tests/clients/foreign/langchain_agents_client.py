"""langchain's agents and langgraph, with names on messages: agents that share one conversation."""

from typing import Literal

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

MODEL = "demo_model"
TOOL_CALLS_TOKEN = 5  # of the demo model's vocabulary


@tool(return_direct=True)
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Get weather for a given city."""
    return f"It's always sunny in {city}!"


@pytest.fixture
def make_chat(url, key):
    def make(**options):
        options = {"max_tokens": 12, "seed": 5} | options
        return ChatOpenAI(model=MODEL, base_url=url, api_key=key, max_retries=0, timeout=60, **options)

    return make


def test_an_agent_answers_in_its_name(make_chat):
    agent = create_agent(make_chat(), tools=[get_weather], system_prompt="You are a helpful assistant.", name="weather")
    state = agent.invoke({"messages": [HumanMessage("What is the weather in Oslo?", name="alice")]})
    assert isinstance(state["messages"][-1], AIMessage)
    if not state["messages"][-1].tool_calls:
        assert state["messages"][-1].name == "weather"
    state = agent.invoke({"messages": [*state["messages"], HumanMessage("And in Rome?", name="alice")]})
    assert len(state["messages"]) >= 4


def test_an_agent_uses_its_tool(make_chat):
    # The demo model does not choose a tool by itself.
    chat = make_chat(max_tokens=300, logit_bias={TOOL_CALLS_TOKEN: 100}, model_kwargs={"parallel_tool_calls": False})
    agent = create_agent(chat, tools=[get_weather], name="weather")
    chunks = list(agent.stream({"messages": [HumanMessage("Weather?", name="bob")]}, stream_mode="updates"))
    results = [m for c in chunks for update in c.values() for m in update["messages"] if isinstance(m, ToolMessage)]
    assert results and all(m.content.startswith("It's always sunny in") for m in results)


async def test_a_graph_of_two_named_agents(make_chat):
    def node(name):
        agent = create_agent(make_chat(temperature=1), tools=[], system_prompt=f"You are the {name}.", name=name)

        async def run(state: MessagesState) -> dict:
            answer = (await agent.ainvoke(state))["messages"][-1]
            assert answer.name == name
            # The other agent reads it as the word of a participant with a name.
            return {"messages": [HumanMessage(answer.content or "...", name=name)]}

        return run

    graph = StateGraph(MessagesState)
    graph.add_node("researcher", node("researcher"))
    graph.add_node("writer", node("writer"))
    graph.add_edge(START, "researcher")
    graph.add_edge("researcher", "writer")
    graph.add_edge("writer", END)
    state = await graph.compile().ainvoke({"messages": [HumanMessage("Compare cats and dogs.", name="user_1")]})
    assert [m.name for m in state["messages"]] == ["user_1", "researcher", "writer"]
