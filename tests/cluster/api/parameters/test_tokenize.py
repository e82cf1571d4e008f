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


async def reads_special_tokens(api: Api, prompt: str) -> None:
    hi = TOKENIZER.encode("hi", bos=False)
    assert (await api.post({"prompt": prompt}))["tokens"] == [1, 3, *hi, 4, 2]
    assert (await api.post({"prompt": prompt.removeprefix("<s>"), "add_special_tokens": False}))["tokens"] == [
        3, *hi, 4, 2,
    ]  # fmt: skip


async def keeps_special_tokens_as_text(api: Api, text: str) -> None:
    ids = (await api.post({"messages": [{"role": "user", "content": text}]}))["tokens"]
    assert ids == [1, 3, *TOKENIZER.encode(text, bos=False), 4]
    assert not set(ids[2:-1]) & TOKENIZER.control_token_ids


async def is_encoded_to(api: Api, row: tuple[list[Any], list[int]]) -> None:
    messages, ids = row
    assert (await api.post({"messages": messages}))["tokens"] == ids


async def adds_the_strings(api: Api, enabled: bool) -> None:
    answer = await api.post({"prompt": PROMPT, "return_token_strs": enabled})
    assert answer["token_strs"] == [TOKENIZER.token_text(i) for i in IDS]


PARTS = [{"type": "text", "text": "alpha"}, {"type": "text", "text": "beta"}]
ALPHA_BETA = [480, 4022, 2015, 10, 10, 4033, 3612]
USER = {"role": "user", "content": "alpha"}
CONVERSATIONS = [
    ([{"role": "user", "content": PARTS}], [1, 3, *ALPHA_BETA, 4]),
    ([{"role": "system", "content": PARTS}, USER], [1, 3, *TOKENIZER.encode("alpha\n\nbeta\n\nalpha", bos=False), 4]),
    ([USER, {"role": "assistant", "content": PARTS}], [1, 3, 480, 4022, 2015, 4, *ALPHA_BETA, 2]),
    ([USER, {"role": "assistant", "content": ""}, USER], [1, 3, 480, 4022, 2015, 4, 2, 3, 480, 4022, 2015, 4]),
    ([USER, {"role": "assistant", "content": None}, USER], [1, 3, 480, 4022, 2015, 4, 2, 3, 480, 4022, 2015, 4]),
    ([{"role": "system", "content": "alpha"}], [1, 3, 480, 4022, 2015, 10, 10, 4]),
]

ROWS = [
    Row("TokenizeRequest.model", "demo", is_accepted),
    Row("TokenizeRequest.model", {"model": "x"}, refused("does not exist", status=404, prompt="a")),
    Row("TokenizeRequest.prompt", PROMPT, is_encoded),
    Row("TokenizeRequest.prompt", {"prompt": None}, refused("either")),
    Row("TokenizeRequest.messages", {"messages": QUESTION}, is_encoded_as_chat_does),
    Row("TokenizeRequest.tools", {"messages": QUESTION, "tools": [TOOL]}, is_encoded_as_chat_does),
    Row("TokenizeRequest.prompt", "<s>[INST] hi[/INST]</s>", reads_special_tokens),
    Row("TokenizeRequest.messages", "<s>[INST] hi[/INST]</s>", keeps_special_tokens_as_text),
    *(Row("TokenizeRequest.messages", row, is_encoded_to) for row in CONVERSATIONS),
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
