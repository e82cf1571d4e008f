"""From steps to events: their order, their numbers, and that the output agrees with them."""

from typing import Any

import msgspec

from cluster.responses.build import EventBuilder, end, output_of
from cluster.responses.items import Asked, FunctionCallItem, OutputMessage
from cluster.responses.records import CallPiece, ResponseRecord, Step, decode_steps, encode_steps

ASKED = Asked(model="m")
RECORD = ResponseRecord(id="resp_ab", owner="", status="in_progress", created_at=5, expires_at=9)
STEPS = [
    Step([7], "Hi", num_cached_tokens=2),
    Step([8], " you"),
    Step([9], calls=[CallPiece(0, "", "abc", "f")]),
    Step([10, 11], calls=[CallPiece(0, '{"a"'), CallPiece(0, ": 1}"), CallPiece(1, "{}", "abd", "g")]),
    Step([2], finish_reason="stop"),
]


def events_of(steps: list[Step], asked: Asked = ASKED) -> list[dict[str, Any]]:
    builder = EventBuilder(RECORD, asked)
    events = [*builder.start()]
    for step in steps:
        events += builder.push(step)
    events += builder.finish(end(RECORD, asked, steps, num_prompt_tokens=4, now=6))
    return [msgspec.to_builtins(event) for event in events]


def test_the_worked_example() -> None:
    events = events_of([Step([7], "Hi"), Step([8], " you"), Step([2], finish_reason="stop")])
    names = [event["type"].removeprefix("response.") for event in events]
    assert names == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(10))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hi you"
    assert events[-1]["response"]["usage"] == {
        "input_tokens": 4,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "total_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def test_calls_are_items_and_the_last_event_has_them_all() -> None:
    events = events_of(STEPS)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert [(item["type"], item.get("call_id"), item.get("arguments")) for item in done] == [
        ("message", None, None), ("function_call", "abc", '{"a": 1}'), ("function_call", "abd", "{}"),
    ]  # fmt: skip
    deltas = "".join(e["delta"] for e in events if e["type"].endswith("arguments.delta") and e["output_index"] == 1)
    assert deltas == '{"a": 1}'
    assert len({item["id"] for item in done}) == 3


def test_background_responses_are_queued_first() -> None:
    events = events_of(STEPS, Asked(model="m", background=True))
    assert [e["response"]["status"] for e in events[:3]] == ["queued", "queued", "in_progress"]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))


def test_a_response_at_its_limit_is_incomplete() -> None:
    events = events_of([Step([7], "Hi", finish_reason="length")])
    last = events[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["status"] == "incomplete" and last["response"]["completed_at"] is None
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_a_model_that_says_nothing_gives_an_empty_message() -> None:
    events = events_of([Step([2], finish_reason="stop")])
    [item] = events[-1]["response"]["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == [item]


def test_output_in_the_middle() -> None:
    message, call = output_of(RECORD, ASKED, STEPS[:4][:3], status="incomplete")
    assert isinstance(message, OutputMessage) and message.status == "completed"
    assert isinstance(call, FunctionCallItem) and call.status == "incomplete" and call.name == "f"


def test_steps_are_small_and_come_back_as_they_were() -> None:
    data = encode_steps(STEPS)
    assert decode_steps(data) == STEPS
    plain = [Step([1000 + i], " word") for i in range(100)]
    assert len(encode_steps(plain)) / 100 < 16, "bytes per token of five characters"
