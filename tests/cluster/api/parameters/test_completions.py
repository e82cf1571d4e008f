"""The fields of /v1/completions alone. What it shares with chat is in test_generation.py."""

import math
from typing import Any

import pytest
from support.clients.api_fields import COMPLETIONS, NUM_TOKENS, PROMPT, SAMPLED, Api, Row, refused
from support.servers.live_replica import TOKENIZER

PATHS = (COMPLETIONS,)
IDS = TOKENIZER.encode(PROMPT)


async def continues_the_same_prompt(api: Api, prompt: Any) -> None:
    assert await api.text(prompt=prompt) == await api.text()


async def continues_each_prompt(api: Api, prompts: list[Any]) -> None:
    choices = (await api.run(prompt=prompts)).response["choices"]
    assert [choice["text"] for choice in choices] == [await api.text(prompt=prompt) for prompt in prompts]


async def needs_a_model_that_can_infill(api: Api, suffix: str) -> None:
    await api.refused({"suffix": suffix}, "suffix", "[SUFFIX]")  # the demo model's vocabulary does not have it
    await api.refused({"suffix": suffix, "echo": True}, "echo", "cannot be combined")
    await api.refused({"suffix": suffix, "prompt": [5, 6]}, "suffix", "text")


async def changes_nothing(api: Api, suffix: str) -> None:
    assert await api.text(suffix=suffix) == await api.text()


async def starts_with_the_prompt(api: Api, echo: bool) -> None:
    text = await api.text()
    assert await api.text(echo=echo) == PROMPT + text
    assert "".join(chunk["choices"][0]["text"] for chunk in await api.chunks(echo=echo)) == PROMPT + text
    nothing = await api.run(max_tokens=0, echo=echo)
    assert (nothing.text, nothing.usage["completion_tokens"]) == (PROMPT, 0)
    await api.refused({"max_tokens": 0}, "max_tokens", "'echo' or 'prompt_logprobs'")


async def starts_with_all_of_the_prompt(api: Api, skip: bool) -> None:
    choice = (await api.run(echo=True, skip_special_tokens=skip, logprobs=0)).choice
    assert choice["text"] == f"<s> {PROMPT}{await api.text()}"
    found = choice["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"].startswith(token, offset)


async def scores_the_prompt(api: Api, echo: bool) -> None:
    choice = (await api.run(echo=echo, logprobs=1)).choice
    found = choice["logprobs"]
    assert found["tokens"][: len(IDS)] == [TOKENIZER.token_text(i) for i in IDS]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert all(math.isfinite(p) and p <= 0 for p in found["token_logprobs"][1:])
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[2:]:
        assert choice["text"].startswith(token, offset)
    assert len({len(values) for values in found.values()}) == 1
    streamed = [chunk["choices"][0]["logprobs"] for chunk in await api.chunks(echo=echo, logprobs=1)]
    assert [p for part in streamed for p in part["token_logprobs"]] == found["token_logprobs"]
    assert [o for part in streamed for o in part["text_offset"]] == found["text_offset"]
    (first, *others) = (await api.run(prompt_logprobs=2)).choice["prompt_logprobs"]
    assert first is None
    own = [entry[str(i)]["logprob"] for i, entry in zip(IDS[1:], others, strict=True)]
    scored = (await api.run(echo=echo, logprobs=0, max_tokens=0)).choice["logprobs"]["token_logprobs"]
    assert scored[1:] == pytest.approx(own)


async def shows_the_likeliest_tokens(api: Api, logprobs: int) -> None:
    choice = (await api.run(logprobs=logprobs)).choice
    assert choice["text"] == await api.text()
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == max(top.values()) == logprob, "greedy sampling takes the likeliest token"
        # Two of them may have the same text.
        assert len(top) in (logprobs - 1, logprobs)


async def shows_the_chosen_token_only(api: Api, logprobs: int) -> None:
    found = (await api.run(logprobs=logprobs)).choice["logprobs"]
    assert all(len(top) == 1 for top in found["top_logprobs"])


async def starts_without_the_first_token(api: Api, add_special_tokens: bool) -> None:
    fields = {"add_special_tokens": add_special_tokens, "return_token_ids": True}
    assert (await api.run(**fields)).prompt_token_ids == IDS[1:]
    assert (await api.run(**fields, prompt=IDS)).prompt_token_ids == IDS


async def reads_special_tokens(api: Api, prompt: str) -> None:
    hi = TOKENIZER.encode("hi", bos=False)
    assert (await api.run(prompt=prompt, return_token_ids=True)).prompt_token_ids == [1, 3, *hi, 4], "<s> comes once"


async def keeps_the_likeliest(api: Api, best_of: int) -> None:
    response = (await api.run(n=best_of, logprobs=0, **SAMPLED)).response
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) for c in response["choices"]}
    ordered = sorted(means, key=lambda text: means[text], reverse=True)
    best = (await api.run(best_of=best_of, n=2, **SAMPLED)).response
    assert [c["text"] for c in best["choices"]] == ordered[:2]
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == best_of * NUM_TOKENS


ROWS = [
    Row("CompletionRequest.prompt", IDS, continues_the_same_prompt),
    Row("CompletionRequest.prompt", [PROMPT, "import os"], continues_each_prompt),
    Row("CompletionRequest.prompt", [IDS, IDS], continues_each_prompt),
    Row("CompletionRequest.prompt", "<s>[INST] hi[/INST]", reads_special_tokens),
    Row("CompletionRequest.prompt", "[INST] hi[/INST]", reads_special_tokens),
    Row("CompletionRequest.suffix", "return a", needs_a_model_that_can_infill),
    Row("CompletionRequest.suffix", "", changes_nothing),
    Row("CompletionRequest.echo", True, starts_with_the_prompt),
    Row("CompletionRequest.echo", True, scores_the_prompt),
    Row("CompletionRequest.echo, GenerationRequest.skip_special_tokens", False, starts_with_all_of_the_prompt),
    Row("CompletionRequest.logprobs", 3, shows_the_likeliest_tokens),
    Row("CompletionRequest.logprobs", 0, shows_the_chosen_token_only),
    Row("CompletionRequest.add_special_tokens", False, starts_without_the_first_token),
    Row("CompletionRequest.best_of", 4, keeps_the_likeliest),
    Row("CompletionRequest.best_of", {"best_of": 1}, refused("at least n", n=2)),
    Row("CompletionRequest.best_of", {"best_of": 2}, refused("streamed", stream=True)),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
