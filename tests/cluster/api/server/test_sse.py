"""The bytes of events: what is encoded once and what each time."""

import msgspec
import pytest

from cluster.api.schemas.chat import ChatChunk, ChatChunkChoice, ChatDelta
from cluster.api.schemas.completions import Completion, CompletionChoice
from cluster.api.server.sse import TextEvents, encode_event

TEXTS = ("", "plain", 'a "quoted"\nline \\ \t\x00\x1f\x7f', "é 漢字 🙂 \u2028 \ufffd", "</script>&'", "data: x\n\n")


def completion(text: str) -> msgspec.Struct:
    return Completion(id="cmpl-1", created=7, model='a "model"', choices=[CompletionChoice(index=3, text=text)])


def chat(text: str) -> msgspec.Struct:
    choices = [ChatChunkChoice(index=0, delta=ChatDelta(content=text))]
    return ChatChunk(id="chatcmpl-1", created=7, model="a", choices=choices)


@pytest.mark.parametrize("make", [completion, chat])
def test_events_that_differ_in_a_text_have_the_bytes_of_events_that_are_encoded_whole(make):
    events = TextEvents(make)
    for text in TEXTS:
        assert events.encode(text) == encode_event(make(text))
