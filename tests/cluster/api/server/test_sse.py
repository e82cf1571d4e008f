"""The bytes of events: what is encoded once and what each time."""

import msgspec
import pytest

from cluster.api.schemas.base import PromptTokensDetails, Usage
from cluster.api.schemas.chat import ChatChunk, ChatChunkChoice, ChatDelta
from cluster.api.schemas.completions import Completion, CompletionChoice
from cluster.api.server.sse import TextEvents, encode_event

TEXTS = ("", "plain", 'a "quoted"\nline \\ \t\x00\x1f\x7f', "é 漢字 🙂 \u2028 \ufffd", "</script>&'", "data: x\n\n")


def completion(text: str, usage: Usage | None) -> msgspec.Struct:
    choices = [CompletionChoice(index=3, text=text)]
    return Completion(id="cmpl-1", created=7, model='a "model"', choices=choices, usage=usage)


def chat(text: str, usage: Usage | None) -> msgspec.Struct:
    choices = [ChatChunkChoice(index=0, delta=ChatDelta(content=text))]
    return ChatChunk(id="chatcmpl-1", created=7, model="a", choices=choices, usage=usage)


def used(num: int) -> Usage:
    details = PromptTokensDetails(cached_tokens=4)
    return Usage(prompt_tokens=5, completion_tokens=num, total_tokens=5 + num, prompt_tokens_details=details)


@pytest.mark.parametrize("make", [completion, chat])
def test_events_that_differ_in_a_text_have_the_bytes_of_events_that_are_encoded_whole(make):
    events = TextEvents(make)
    for text in TEXTS:
        assert events.encode(text) == encode_event(make(text, None))


@pytest.mark.parametrize("make", [completion, chat])
def test_events_with_the_usage_so_far_are_such_too(make):
    numbers = iter(range(100, 200))
    events = TextEvents(make, lambda: used(next(numbers)))
    for i, text in enumerate(TEXTS):
        assert events.encode(text) == encode_event(make(text, used(100 + i)))
