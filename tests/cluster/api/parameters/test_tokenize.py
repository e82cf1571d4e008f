"""The fields of /tokenize."""

from typing import Any

import pytest
from support.clients.api_fields import PROMPT, QUESTION, Api, Row, refused
from support.servers.live_replica import TOKENIZER

PATHS = ("/tokenize",)
IDS = TOKENIZER.encode(PROMPT)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


async def is_accepted(api: Api, model: str) -> None:
    assert (await api.post({"model": model, "prompt": PROMPT}))["tokens"] == IDS


async def is_encoded(api: Api, prompt: str) -> None:
    answer = await api.post({"prompt": prompt})
    assert answer == {"tokens": IDS, "count": len(IDS), "max_model_len": 1024}


async def is_encoded_as_chat_does(api: Api, fields: dict[str, Any]) -> None:
    assert (await api.post(fields))["tokens"] == await api.prompt_ids(**fields)


async def changes_the_prompt(api: Api, tools: list[Any]) -> None:
    plain = (await api.post({"messages": QUESTION}))["tokens"]
    assert (await api.post({"messages": QUESTION, "tools": tools}))["tokens"] != plain


async def leaves_out_the_first_token(api: Api, add_special_tokens: bool) -> None:
    answer = await api.post({"prompt": PROMPT, "add_special_tokens": add_special_tokens})
    assert answer["tokens"] == IDS[1:]


async def adds_the_strings(api: Api, enabled: bool) -> None:
    answer = await api.post({"prompt": PROMPT, "return_token_strs": enabled})
    assert answer["token_strs"] == [TOKENIZER.token_text(i) for i in IDS]


ROWS = [
    Row("TokenizeRequest.model", "demo", is_accepted),
    Row("TokenizeRequest.model", {"model": "x"}, refused("does not exist", status=404, prompt="a")),
    Row("TokenizeRequest.prompt", PROMPT, is_encoded),
    Row("TokenizeRequest.prompt", {"prompt": None}, refused("either")),
    Row("TokenizeRequest.messages", {"messages": QUESTION}, is_encoded_as_chat_does),
    Row("TokenizeRequest.tools", {"messages": QUESTION, "tools": [TOOL]}, is_encoded_as_chat_does),
    Row("TokenizeRequest.tools", [TOOL], changes_the_prompt),
    Row("TokenizeRequest.add_special_tokens", False, leaves_out_the_first_token),
    Row(
        "TokenizeRequest.continue_final_message, TokenizeRequest.add_generation_prompt, TokenizeRequest.chat_template_kwargs",
        {
            "messages": [*QUESTION, {"role": "assistant", "content": "def f("}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        is_encoded_as_chat_does,
    ),
    Row("TokenizeRequest.return_token_strs", True, adds_the_strings),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
