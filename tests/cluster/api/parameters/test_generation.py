"""The fields that completions and chat share: each row is sent to both endpoints."""

import json
import logging
from typing import Any

import pytest
from support.clients.api_fields import CHAT, COMPLETIONS, NUM_TOKENS, SAMPLED, Api, Row, refused, text_of
from support.servers.live_replica import TOKENIZER

PATHS = (COMPLETIONS, CHAT)
USAGE = {"include_usage": True}
EOS = 2
# A prompt that is longer than the context, and what the endpoint would answer.
LONG = {COMPLETIONS: {"prompt": [5] * 1100}, CHAT: {"messages": [{"role": "user", "content": "x y z " * 400}]}}
MAX_MODEL_LEN = 1024


async def generates_exactly(api: Api, max_tokens: int) -> None:
    output = await api.run(max_tokens=max_tokens)
    assert output.usage["completion_tokens"] == max_tokens
    assert output.choice["finish_reason"] == "length"


async def generates_nothing_but_scores_the_prompt(api: Api, max_tokens: int) -> None:
    output = await api.run(max_tokens=max_tokens, prompt_logprobs=0)
    assert (output.text, output.usage["completion_tokens"]) == ("", 0)
    await api.refused({"max_tokens": max_tokens}, "max_tokens", "'prompt_logprobs'")


async def gives_different_choices(api: Api, n: int) -> None:
    response = (await api.run(n=n, **SAMPLED)).response
    texts = [text_of(choice) for choice in response["choices"]]
    assert [choice["index"] for choice in response["choices"]] == list(range(n))
    assert texts[0] == await api.text(**SAMPLED)
    assert len(set(texts)) >= 2
    assert response["usage"]["completion_tokens"] == n * NUM_TOKENS


async def sends_the_same_text_in_chunks(api: Api, stream: bool) -> None:
    chunks = await api.chunks(stream=stream)
    assert len(chunks) > 3
    assert "".join(text_of(chunk["choices"][0]) for chunk in chunks) == await api.text()
    assert all(chunk["usage"] is None for chunk in chunks)
    # Chunks with a text and nothing else are encoded in a way of their own; these have more.
    *others, _ = await api.chunks(stream=stream, stream_options=USAGE | {"continuous_usage_stats": True})
    assert [without_what_differs(chunk) for chunk in chunks] == [without_what_differs(chunk) for chunk in others]


def without_what_differs(chunk: dict[str, Any]) -> str:
    """A chunk's fields in their order; those that are different in each answer are empty."""
    return json.dumps(chunk | {"id": "", "created": 0, "usage": None})


async def adds_the_usage_at_the_end(api: Api, options: Any) -> None:
    *chunks, last = await api.chunks(stream_options=options)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == (await api.run()).usage["total_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert await api.text(stream_options=options) == await api.text()


async def adds_the_usage_to_every_chunk(api: Api, enabled: bool) -> None:
    *chunks, last = await api.chunks(stream_options=USAGE | {"continuous_usage_stats": enabled})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0] < counts[-1], counts[-1]) == (True, NUM_TOKENS)
    assert last["choices"] == []
    alone = {"stream": True, "stream_options": {"continuous_usage_stats": enabled}}
    await api.refused(alone, "stream_options", "include_usage")


async def ends_before_the_stop_string(api: Api, part: slice) -> None:
    text = await api.text()
    end = text[part]
    for stop in (end, ["never in it", end]):
        output = await api.run(stop=stop)
        assert output.text == text[: text.index(end)]
        assert output.choice["finish_reason"] == "stop"


async def ends_before_the_last_of_16_stop_strings(api: Api, part: slice) -> None:
    text = await api.text()
    end = text[part]
    assert await api.text(stop=[*(f"never {i}" for i in range(15)), end]) == text[: text.index(end)]


async def ends_after_the_special_token_of_that_name(api: Api, name: str) -> None:
    token_id = TOKENIZER.control_token_id(name)
    for stop in (name, ["never in it", name]):
        output = await api.run(stop=stop, logit_bias={str(token_id): 100}, return_token_ids=True)
        assert (output.text, output.token_ids, output.choice["finish_reason"]) == ("", [token_id], "stop")
    bias = {"logit_bias": {str(token_id): 100}}
    assert await api.text(stop=name, include_stop_str_in_output=True, **bias) == name
    assert (await api.run(**bias)).choice["finish_reason"] == "length"


async def keeps_the_stop_string(api: Api, part: slice) -> None:
    text = await api.text()
    end = text[part]
    assert await api.text(stop=end, include_stop_str_in_output=True) == text[: text.index(end) + len(end)]


async def shows_special_tokens(api: Api, skip: bool) -> None:
    names = {"[INST]": 3, "</s>": EOS}
    for name, token_id in names.items():
        fields = {"logit_bias": {str(token_id): 100}, "max_tokens": 3, "ignore_eos": True}
        for value, text in ((None, ""), (True, ""), (skip, name * 3)):
            assert await api.text(**fields, skip_special_tokens=value) == text
        assert (
            "".join(text_of(c["choices"][0]) for c in await api.chunks(**fields, skip_special_tokens=skip)) == name * 3
        )
        assert await api.text(**fields, skip_special_tokens=skip, stop=name[1:]) == name[0], "a stop string sees them"
    to_eos = {"logit_bias": {str(EOS): 100}, "skip_special_tokens": skip}
    assert await api.text(**to_eos) == "", "the end token does not show"
    assert await api.text(**to_eos, include_stop_str_in_output=True) == "</s>"
    assert (await api.text(skip_special_tokens=skip)).strip() == (await api.text()).strip()


async def is_random(api: Api, temperature: float) -> None:
    assert len({await api.text(temperature=temperature, seed=seed) for seed in range(4)}) == 4


async def is_greedy(api: Api, temperature: float) -> None:
    assert {await api.text(temperature=temperature, seed=seed) for seed in range(4)} == {await api.text(temperature=0)}


async def leaves_the_likeliest_token_only(api: Api, fields: dict[str, Any]) -> None:
    assert await api.ids(**SAMPLED) != await api.ids()
    assert await api.ids(**SAMPLED, **fields) == await api.ids()


async def leaves_all_tokens(api: Api, fields: dict[str, Any]) -> None:
    assert await api.ids(**SAMPLED, **fields) == await api.ids(**SAMPLED)


async def repeats_less(api: Api, fields: dict[str, Any]) -> None:
    assert len(set(await api.ids(max_tokens=48, **fields))) > len(set(await api.ids(max_tokens=48)))


async def repeats_nothing(api: Api, repetition_penalty: float) -> None:
    plain = await api.ids(max_tokens=48)
    assert len(set(plain)) < len(plain)
    penalized = await api.ids(max_tokens=48, repetition_penalty=repetition_penalty)
    assert len(set(penalized)) == len(penalized) > 3


async def repeats_no_less(api: Api, fields: dict[str, Any]) -> None:
    assert len(set(await api.ids(max_tokens=48, **fields))) <= len(set(await api.ids(max_tokens=48)))


async def forces_the_token(api: Api, bias: dict[str, float]) -> None:
    assert {str(i) for i in await api.ids(logit_bias=bias)} == set(bias)


async def forbids_the_token(api: Api, bias: float) -> None:
    first, *_ = await api.ids()
    assert first not in await api.ids(logit_bias={str(first): bias})


async def repeats_the_output(api: Api, seed: int) -> None:
    assert await api.text(temperature=1, seed=seed) == await api.text(temperature=1, seed=seed)
    assert await api.text(temperature=1, seed=seed + 1) != await api.text(temperature=1, seed=seed)
    assert await api.text(temperature=1) != await api.text(temperature=1)


async def is_the_seed(api: Api, random_seed: int) -> None:
    assert await api.text(temperature=1, random_seed=random_seed) == await api.text(temperature=1, seed=random_seed)


async def is_logged(api: Api, user: str) -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("cluster.api")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        assert await api.text(user=user) == await api.text()
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert [user in message for message in messages] == [True]


async def is_never_chosen_before(api: Api, min_tokens: int) -> None:
    ids = await api.ids()
    stop = ids[4]
    later = await api.ids(stop_token_ids=[stop], min_tokens=min_tokens)
    assert len(later) >= min_tokens > ids.index(stop) + 1
    assert stop not in later[:min_tokens], "the stop token must not be chosen before min_tokens"
    await api.refused({"min_tokens": NUM_TOKENS + 1}, "min_tokens", f"more than the {NUM_TOKENS}")


async def ends_after_the_token(api: Api, position: int) -> None:
    ids = await api.ids()
    stop = ids[position]
    output = await api.run(stop_token_ids=[stop], return_token_ids=True)
    assert output.token_ids == ids[: ids.index(stop) + 1]
    assert output.choice["finish_reason"] == "stop"


async def continues_after_the_end_token(api: Api, ignore_eos: bool) -> None:
    to_eos = {"logit_bias": {str(EOS): 100}, "max_tokens": 4}
    assert await api.ids(**to_eos) == [EOS]
    assert await api.ids(**to_eos, ignore_eos=ignore_eos) == [EOS] * 4


async def avoids_the_word(api: Api, number: int) -> None:
    word = [w for w in (await api.text(max_tokens=40)).split() if w.isalpha() and len(w) > 1][number]
    assert word not in (await api.text(max_tokens=40, bad_words=[word])).split()


async def allows_only(api: Api, token_ids: list[int]) -> None:
    assert set(await api.ids(**SAMPLED, allowed_token_ids=token_ids)) <= set(token_ids)
    await api.refused({"allowed_token_ids": [4096]}, "allowed_token_ids", "4096")
    impossible = {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}
    await api.refused(impossible, "allowed_token_ids", "'min_tokens' forbids")
    words = [ids[0] for ids in TOKENIZER.bad_words_ids(["return"])]
    await api.refused({"allowed_token_ids": words, "bad_words": ["return"]}, None, "banned")


async def keeps_the_last_tokens_of_the_prompt(api: Api, keep: int) -> None:
    ids = (await api.run(return_token_ids=True)).prompt_token_ids
    output = await api.run(truncate_prompt_tokens=keep, return_token_ids=True)
    assert output.prompt_token_ids == [ids[0], *ids[1 - keep :]]
    assert output.usage["prompt_tokens"] == keep
    await api.refused({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "leaves no prompt")


async def keeps_what_fits(api: Api, keep: int) -> None:
    long = LONG[api.path]
    await api.refused(long, next(iter(long)), "context")
    output = await api.run(**long, truncate_prompt_tokens=keep)
    assert output.usage["prompt_tokens"] == MAX_MODEL_LEN - NUM_TOKENS


async def scores_every_prompt_token(api: Api, count: int) -> None:
    output = await api.run(prompt_logprobs=count, return_token_ids=True)
    first, *others = found = output.response.get("prompt_logprobs") or output.choice["prompt_logprobs"]
    assert first is None
    for token_id, entry in zip(output.prompt_token_ids[1:], others, strict=True):
        assert str(token_id) in entry
        assert sorted(e["rank"] for e in entry.values())[:count] == list(range(1, count + 1))
        assert all(e["logprob"] <= 0 for e in entry.values())
    head, *rest = await api.chunks(prompt_logprobs=count)
    assert (head.get("prompt_logprobs") or head["choices"][0]["prompt_logprobs"]) == found
    assert all("prompt_logprobs" not in part for chunk in rest for part in (chunk, chunk["choices"][0]))


async def adds_the_token_ids(api: Api, enabled: bool) -> None:
    plain, output = await api.run(), await api.run(return_token_ids=enabled)
    assert "token_ids" not in plain.choice
    assert len(output.prompt_token_ids) == output.usage["prompt_tokens"]
    assert len(output.token_ids) == NUM_TOKENS
    chunks = await api.chunks(return_token_ids=enabled)
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == output.token_ids


async def reaches_the_engine(api: Api, priority: int) -> None:
    seen = []
    add = api.replica.core.add_request
    api.replica.core.add_request = lambda request: (seen.append(request.priority), add(request))[1]  # type: ignore[method-assign]
    try:
        await api.text(priority=priority)
        await api.text(priority=None)
    finally:
        del api.replica.core.add_request
    assert seen == [priority, 0]


ROWS = [
    Row("SampledRequest.model", {"model": "gpt-4"}, refused("does not exist", status=404)),
    Row("SampledRequest.max_tokens", 1, generates_exactly),
    Row("SampledRequest.max_tokens", 5, generates_exactly),
    Row("SampledRequest.max_tokens", 0, generates_nothing_but_scores_the_prompt),
    Row("GenerationRequest.n", 3, gives_different_choices),
    Row("SampledRequest.stream", True, sends_the_same_text_in_chunks),
    Row("SampledRequest.stream_options, StreamOptions.include_usage", USAGE, adds_the_usage_at_the_end),
    Row("StreamOptions.continuous_usage_stats", True, adds_the_usage_to_every_chunk),
    Row("SampledRequest.stop", slice(6, 9), ends_before_the_stop_string),
    Row("SampledRequest.stop", slice(6, 9), ends_before_the_last_of_16_stop_strings),
    Row("SampledRequest.stop", {"stop": list("abcdefghijklmnopq")}, refused("length <= 16")),
    Row("SampledRequest.stop", "[INST]", ends_after_the_special_token_of_that_name),
    Row("GenerationRequest.include_stop_str_in_output", slice(6, 9), keeps_the_stop_string),
    Row("GenerationRequest.skip_special_tokens", False, shows_special_tokens),
    Row("SampledRequest.temperature", 1.5, is_random),
    Row("SampledRequest.temperature", 0.001, is_greedy),
    Row("SampledRequest.top_p", {"top_p": 1e-9}, leaves_the_likeliest_token_only),
    Row("SampledRequest.top_p", {"top_p": 0}, leaves_the_likeliest_token_only),
    Row("SampledRequest.top_p", {"top_p": 1}, leaves_all_tokens),
    Row("GenerationRequest.top_k", {"top_k": 1}, leaves_the_likeliest_token_only),
    Row("GenerationRequest.top_k", {"top_k": 0}, leaves_all_tokens),
    Row("GenerationRequest.top_k", {"top_k": -1}, leaves_all_tokens),
    Row("GenerationRequest.min_p", {"min_p": 1.0}, leaves_the_likeliest_token_only),
    Row("GenerationRequest.min_p", {"min_p": 0}, leaves_all_tokens),
    Row("GenerationRequest.presence_penalty", {"presence_penalty": 2}, repeats_less),
    Row("GenerationRequest.frequency_penalty", {"frequency_penalty": 2}, repeats_less),
    Row("GenerationRequest.frequency_penalty", {"frequency_penalty": -2}, repeats_no_less),
    Row("GenerationRequest.repetition_penalty", 100, repeats_nothing),
    Row("GenerationRequest.logit_bias", {"77": 100}, forces_the_token),
    Row("GenerationRequest.logit_bias", -100, forbids_the_token),
    Row("SampledRequest.seed", 5, repeats_the_output),
    Row("SampledRequest.random_seed", 5, is_the_seed),
    Row("SampledRequest.random_seed", {"random_seed": 5}, refused("differ", seed=6)),
    Row("SampledRequest.user", "u-1", is_logged),
    Row("SampledRequest.user", {"user": 5}, refused("str")),
    Row("SampledRequest.min_tokens", 8, is_never_chosen_before),
    Row("GenerationRequest.stop_token_ids", 4, ends_after_the_token),
    Row("SampledRequest.ignore_eos", True, continues_after_the_end_token),
    Row("GenerationRequest.bad_words", 0, avoids_the_word),
    Row("GenerationRequest.allowed_token_ids", [70, 71, 72], allows_only),
    Row("GenerationRequest.truncate_prompt_tokens", 4, keeps_the_last_tokens_of_the_prompt),
    Row("GenerationRequest.truncate_prompt_tokens", -1, keeps_what_fits),
    Row("GenerationRequest.prompt_logprobs", 2, scores_every_prompt_token),
    Row("GenerationRequest.return_token_ids", True, adds_the_token_ids),
    Row("SampledRequest.priority", -4, reaches_the_engine),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_field(api: Api, row: Row) -> None:
    await row.prove(api, row.value)
