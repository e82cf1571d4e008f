"""What a model thinks is not part of its answer: at any division into deltas, with tools, stop strings and an end in mid-thought."""

from pathlib import Path

import pytest
from support.vocabularies.tekken import write_tekken

from cluster.text.output.output_text import OutputText
from cluster.text.output.thoughts import think_token_ids
from cluster.text.tokenizer import Tokenizer, load_tokenizer
from workers.protocol import FinishReason, TokenDelta, TokenLogprob


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tekken(tmp_path_factory.mktemp("v13"), "v13"))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """[THINK] and the like are their tokens."""
    return tokenizer.encode_prompt(text, add_special_tokens=False)


def pushed(output: OutputText, ids: list[int], size: int = 1) -> tuple[str, str, list[TokenLogprob]]:
    """Thoughts, text and the tokens with log-probabilities, pushed `size` tokens at a time."""
    thoughts, text, logprobs = "", "", []
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        step = output.push(
            TokenDelta(
                request_id="r",
                token_ids=part,
                logprobs=[TokenLogprob(token_id=i, logprob=-1.0, rank=1) for i in part],
                finish_reason=FinishReason.LENGTH if start + size >= len(ids) else None,
            )
        )
        assert not (thoughts and text and step.thoughts and not step.text), "thoughts after the text"
        thoughts, text = thoughts + step.thoughts, text + step.text
        logprobs += [placed.logprob for placed in step.logprobs]
        if step.finish_reason is not None:
            break
    return thoughts, text, logprobs


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_thoughts_and_answer(tokenizer: Tokenizer, size: int) -> None:
    ids = ids_of(tokenizer, "[THINK]is it 日本? no 😀[/THINK]It is 4.")
    output = OutputText(tokenizer, reads_thoughts=True)
    thoughts, text, logprobs = pushed(output, ids, size)
    assert (thoughts, text) == ("is it 日本? no 😀", "It is 4.")
    assert tokenizer.decode([one.token_id for one in logprobs]) == text, "only the answer has log-probabilities"
    assert output.num_tokens == len(ids)


def test_without_the_option_and_with_special_tokens_shown_all_is_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "[THINK]no[/THINK]4")
    assert pushed(OutputText(tokenizer), ids)[:2] == ("", "no4")
    shown = OutputText(tokenizer, reads_thoughts=True, shows_special=True)
    assert pushed(shown, ids)[:2] == ("", "[THINK]no[/THINK]4")


def test_an_end_in_mid_thought(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "[THINK]is it 日")
    assert pushed(OutputText(tokenizer, reads_thoughts=True), ids)[:2] == ("is it 日", "")


def test_stop_strings_are_of_the_answer(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "[THINK]the END of it[/THINK]the END of it")
    output = OutputText(tokenizer, reads_thoughts=True, stop=["END"])
    assert pushed(output, ids)[:2] == ("the END of it", "the ")


def test_calls_end_the_thoughts(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, '[THINK]I add[TOOL_CALLS]add[ARGS]{"a": 1}')
    output = OutputText(tokenizer, reads_thoughts=True, tool_calls_token_id=tokenizer.tool_calls_token_id)
    assert pushed(output, ids)[:2] == ("I add", "") and output.called_tools


def test_a_replay_restores_the_state(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "[THINK]is it 日本?[/THINK]It is 4.")
    whole = pushed(OutputText(tokenizer, reads_thoughts=True), ids)
    for at in range(1, len(ids)):
        before, after = OutputText(tokenizer, reads_thoughts=True), OutputText(tokenizer, reads_thoughts=True)
        first = [before.push(TokenDelta(request_id="r", token_ids=[i])) for i in ids[:at]]
        after.replay(ids[:at])
        thoughts, text, _ = pushed(after, ids[at:])
        assert ("".join(s.thoughts for s in first) + thoughts, "".join(s.text for s in first) + text) == whole[:2]


def test_vocabularies_without_the_tokens_do_not_think(tmp_path: Path, tokenizer: Tokenizer) -> None:
    older = load_tokenizer(write_tekken(tmp_path, "v7"))
    assert think_token_ids(older) is None and think_token_ids(tokenizer) == (34, 35)
    ids = older.encode("[THINK]no[/THINK]", bos=False)
    assert pushed(OutputText(older, reads_thoughts=True), ids)[:2] == ("", "[THINK]no[/THINK]")
