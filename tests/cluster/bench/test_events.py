"""Events of a stream, in whatever pieces they come, and what each says."""

import msgspec
import pytest

from cluster.bench.events import Splitter, error_message, read_event

BODY = b': hello\n\ndata: {"a": 1}\n\nevent: x\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\n'
DATA = [b'{"a": 1}', b'{"b":\n2}', b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_are_found_in_pieces_of_any_size(size: int, newline: bytes) -> None:
    body = BODY.replace(b"\n", newline)
    splitter = Splitter()
    found = [event for i in range(0, len(body), size) for event in splitter.feed(body[i : i + size])]
    assert found == DATA


@pytest.mark.parametrize(
    ("chunk", "has_tokens", "is_last"),
    [
        (b'{"choices": [{"text": "a", "finish_reason": null}]}', True, False),
        (b'{"choices": [{"text": "", "finish_reason": null}]}', True, False),  # half a character is held back
        (b'{"choices": [{"text": "", "finish_reason": "stop"}]}', False, True),
        (b'{"choices": [{"text": "a", "finish_reason": "length"}]}', True, True),
        (b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}', False, False),
        (b'{"choices": [{"delta": {"content": "a"}}]}', True, False),
        (b'{"choices": [{"delta": {"reasoning_content": "a"}}]}', True, False),
        (b'{"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}', True, False),
        (b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}', False, True),
        (b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}', False, False),
        (b'{"choices": null}', False, False),
    ],
)
def test_which_events_bring_tokens(chunk: bytes, has_tokens: bool, is_last: bool) -> None:
    event = read_event(chunk)
    assert (event.has_tokens, event.is_last_choice, event.error) == (has_tokens, is_last, None)


def test_usage_and_errors_are_read() -> None:
    usage = read_event(b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}').usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 4)
    assert read_event(b'{"error": {"message": "no memory", "code": 500}}').error == "no memory"


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        read_event(b"<html>")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error": {"message": "a"}}', "a"),
        (b'{"error": "b"}', "b"),
        (b"<p>c</p>", "<p>c</p>"),
        (b'{"detail": "d"}', '{"detail": "d"}'),
    ],
)
def test_the_message_of_a_refusal(data: bytes, message: str) -> None:
    assert error_message(data) == message
