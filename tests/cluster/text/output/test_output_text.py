"""Detokenizer and stop strings together: what a delta shows, and that a replay restores the state."""

from pathlib import Path
from typing import Any

import mistral_common
import pytest

from cluster.text.output.output_text import OutputText
from cluster.text.tokenizer import open_tokenizer
from workers.protocol import FinishReason, TokenDelta, TokenLogprob

TOKENIZER = open_tokenizer(
    Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3", "v3"
)
TEXT = "It is 日本 time; the END of 😀 it"
IDS = TOKENIZER.encode(TEXT, bos=False)
HELLO = TOKENIZER.pieces.names.index("▁Hello")


def delta(
    ids: list[int], *, finish: FinishReason | None = None, stop_token_id: int | None = None, logprobs: bool = False
):
    marks = [TokenLogprob(token_id=i, logprob=-1.0, rank=1) for i in ids] if logprobs else None
    return TokenDelta(request_id="r", token_ids=ids, finish_reason=finish, stop_token_id=stop_token_id, logprobs=marks)


def test_a_stop_string_ends_the_sequence_in_mid_delta() -> None:
    output = OutputText(TOKENIZER, stop=["END"])
    step = output.push(delta(IDS))
    assert (step.text, step.finish_reason) == ("It is 日本 time; the ", FinishReason.STOP)
    assert output.num_tokens < len(IDS), "tokens after the stop string do not count"


def test_the_stop_token_is_counted_and_is_not_text() -> None:
    output = OutputText(TOKENIZER)
    step = output.push(delta([HELLO, HELLO], finish=FinishReason.STOP, stop_token_id=HELLO))
    assert (step.text, output.num_tokens) == ("Hello", 2)


# Rows: the arguments, the last token and how it ended the output, the text after "the END" and its logprobs' offset.
SHOWN = {"shows_special": True}
ENDS = [
    ({}, 2, 2, "", 7),
    ({"include_stop": True}, 2, 2, "", 7),
    (SHOWN, 2, 2, "", 7),
    (SHOWN | {"include_stop": True}, 2, 2, "</s>", 7),
    (SHOWN, 2, None, "</s>", 7),
    ({}, 2, None, "", 7),
    # A stop token that is text, as with `stop_token_ids`.
    ({}, HELLO, HELLO, "", 7),
    ({"include_stop": True}, HELLO, HELLO, " Hello", 7),
    # A stop string that names a special token.
    ({"stop": ["</s>"], "include_stop": True}, 2, 2, "</s>", 7),
    (SHOWN | {"stop": ["</s>"]}, 2, 2, "", 7),
    (SHOWN | {"stop": ["</s>"], "include_stop": True}, 2, 2, "</s>", 7),
    (SHOWN | {"stop": ["D</s>"]}, 2, None, None, None),
    (SHOWN | {"stop": ["</s>!"]}, 2, None, "</s>", 7),
]


@pytest.mark.parametrize(("arguments", "token_id", "stop_token_id", "shown", "offset"), ENDS)
def test_what_shows_of_the_last_token(
    arguments: dict[str, Any], token_id: int, stop_token_id: int | None, shown: str | None, offset: int | None
) -> None:
    output = OutputText(TOKENIZER, shows_end=True, **arguments)
    ids = [*TOKENIZER.encode("the END", bos=False), token_id]
    finish = FinishReason.LENGTH if stop_token_id is None else FinishReason.STOP
    step = output.push(delta(ids, finish=finish, stop_token_id=stop_token_id, logprobs=True))
    if shown is None:  # a stop string across text and a special token
        assert (step.text, step.finish_reason) == ("the EN", FinishReason.STOP)
    else:
        assert (step.text, step.finish_reason) == (f"the END{shown}", finish)
        assert (step.logprobs[-1].logprob.token_id, step.logprobs[-1].text_offset) == (token_id, offset)


def test_special_tokens_between_words_are_text_only_if_asked_for() -> None:
    ids = [1, *TOKENIZER.encode("one", bos=False), 3, *TOKENIZER.encode("two", bos=False), 4]
    for arguments, text in (({}, "one two"), (SHOWN, "<s> one[INST] two[/INST]")):
        output = OutputText(TOKENIZER, **arguments)
        steps = [output.push(delta([i], logprobs=True)) for i in ids]
        assert "".join([step.text for step in steps]) == text
        placed = [p for step in steps for p in step.logprobs]
        if arguments:
            ends = [*(p.text_offset for p in placed[1:]), len(text)]
            pieces = [text[p.text_offset : end] for p, end in zip(placed, ends, strict=True)]
            assert pieces == [TOKENIZER.token_text(i) for i in ids], "each token's text starts at its offset"


def test_held_text_comes_at_the_end() -> None:
    output = OutputText(TOKENIZER, stop=["ENDING"])
    shown = output.push(delta(IDS[: len(IDS) // 2])).text
    for i in IDS[len(IDS) // 2 : -1]:
        shown += output.push(delta([i])).text
    step = output.push(delta(IDS[-1:], finish=FinishReason.LENGTH))
    assert shown + step.text == TEXT
    assert step.finish_reason is FinishReason.LENGTH


def test_a_stop_string_completed_by_the_last_token_makes_it_stop() -> None:
    ids = TOKENIZER.encode("the END", bos=False)
    step = OutputText(TOKENIZER, stop=["END"]).push(delta(ids, finish=FinishReason.LENGTH))
    assert (step.text, step.finish_reason) == ("the ", FinishReason.STOP)


def test_before_min_tokens_stop_strings_are_ignored() -> None:
    ids = TOKENIZER.encode("END one END two", bos=False)
    num_first = len(TOKENIZER.encode("END", bos=False))
    step = OutputText(TOKENIZER, stop=["END"], min_tokens=num_first).push(delta(ids))
    assert step.text == "END one "


@pytest.mark.parametrize("cut", range(len(IDS) + 1))
def test_a_replay_continues_like_the_original(cut: int) -> None:
    prompt = TOKENIZER.encode("After a prompt")
    arguments = {"continues": prompt, "stop": ["of 😁", "zzz"], "shows_special": True}
    original, rebuilt = OutputText(TOKENIZER, **arguments), OutputText(TOKENIZER, **arguments)
    original.push(delta(IDS[:cut]))
    rebuilt.replay(IDS[:cut])
    ends = [o.push(delta(IDS[cut:], finish=FinishReason.LENGTH)) for o in (original, rebuilt)]
    assert ends[0] == ends[1]
    assert original.num_tokens == rebuilt.num_tokens == len(IDS)


def test_logprobs_come_with_their_text_and_point_into_it() -> None:
    output = OutputText(TOKENIZER, stop=["time and again"])
    text, placed = "", []
    for n, i in enumerate(IDS):
        step = output.push(delta([i], logprobs=True, finish=FinishReason.LENGTH if n == len(IDS) - 1 else None))
        text += step.text
        placed += step.logprobs
        assert all(p.text_offset <= len(text) for p in placed)
    assert [p.logprob.token_id for p in placed] == IDS
    for p in placed:
        piece = TOKENIZER.token_text(p.logprob.token_id)
        if not piece.startswith("<0x"):
            assert text[p.text_offset :].startswith(piece if p.text_offset else piece.lstrip())


def test_logprobs_of_a_stop_string_are_dropped_with_it() -> None:
    ids = TOKENIZER.encode("the END", bos=False)
    output = OutputText(TOKENIZER, stop=[" END"])
    placed = [
        p
        for i in ids
        for p in (output.push(delta([i], logprobs=True)).logprobs if output.finish_reason is None else [])
    ]
    assert [TOKENIZER.token_text(p.logprob.token_id) for p in placed] == [" the"]
