"""Incremental detokenization equals SentencePiece's decode of all ids at once, however they are split."""

from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import DEMO_MODEL

from cluster.text.output.detokenizer import Detokenizer
from cluster.text.tokenizer import Tokenizer, open_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
DEMO = DEMO_MODEL / "tokenizer.model.v3"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "demo": DEMO,
}
TOKENIZERS = {name: open_tokenizer(path, "v1") for name, path in FILES.items()}
# Bytes at the edges of UTF-8: leads, trails, overlong, surrogate and out-of-range forms.
EDGE_BYTES = [
    0x00,
    0x41,
    0x80,
    0x8F,
    0x90,
    0x9F,
    0xA0,
    0xBF,
    0xC0,
    0xC2,
    0xDF,
    0xE0,
    0xE2,
    0xED,
    0xEF,
    0xF0,
    0xF4,
    0xF5,
    0xFF,
]
MULTI_BYTE = "naïve 日本語 😀👩‍👩‍👧 ᚠ\u0301 tab\t\n\n  two  spaces Ω≈ç√∫ \U00010348"


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    return tokenizer.pieces.bytes.index(byte)


def id_sequences(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    edge = st.sampled_from([byte_id(tokenizer, b) for b in EDGE_BYTES])
    special = st.sampled_from([0, *sorted(tokenizer.control_token_ids)[:6]])
    spaces = st.sampled_from([i for i, s in enumerate(tokenizer.pieces.surfaces) if s and not s.strip(" ")][:4])
    return st.lists(st.one_of(any_id, edge, edge, special, spaces), max_size=20)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_in_any_split_equal_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(id_sequences(tokenizer))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    detokenizer = Detokenizer(tokenizer.pieces)
    text, begin = "", 0
    for cut in [*cuts, len(ids)]:
        text += detokenizer.push(ids[begin:cut])
        begin = cut
    assert text + detokenizer.flush() == tokenizer.decode(ids)
    assert detokenizer.num_chars == len(tokenizer.decode(ids))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_returned_text_is_final(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(id_sequences(tokenizer))
    detokenizer = Detokenizer(tokenizer.pieces)
    shown, what_follows = "", [data.draw(id_sequences(tokenizer)) for _ in range(3)]
    for i, token_id in enumerate(ids):
        shown += detokenizer.push([token_id])
        for more in what_follows:
            assert tokenizer.decode([*ids[: i + 1], *more]).startswith(shown)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_after_a_prompt_it_is_the_whole_text_without_the_prompt(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, output = data.draw(id_sequences(tokenizer)), data.draw(id_sequences(tokenizer))
    detokenizer = Detokenizer(tokenizer.pieces, continues=prompt)
    text = detokenizer.push(output) + detokenizer.flush()
    whole, before = tokenizer.decode(prompt + output), tokenizer.decode(prompt)
    if whole.startswith(before):
        assert text == whole[len(before) :]
    else:  # our first bytes completed a character that the prompt's decode shows as U+FFFD
        settled = before.rstrip("�")
        assert whole == settled + whole[len(settled) :]
        assert whole.endswith(text)
        assert text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_multi_byte_text_comes_in_whole_characters(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(MULTI_BYTE)
    assert any(tokenizer.pieces.bytes[i] is not None for i in ids), "the text must need byte tokens to test anything"
    detokenizer = Detokenizer(tokenizer.pieces)
    parts = [detokenizer.push([i]) for i in ids] + [detokenizer.flush()]
    assert "".join(parts) == MULTI_BYTE
    assert not any("�" in p for p in parts)


def test_the_space_that_opens_a_text() -> None:
    tokenizer = TOKENIZERS["v3"]
    hello, world = tokenizer.pieces.names.index("▁Hello"), tokenizer.pieces.names.index("▁world")
    end_inst = tokenizer.pieces.names.index("[/INST]")
    assert Detokenizer(tokenizer.pieces, continues=[1, hello]).push([world]) == " world"
    assert Detokenizer(tokenizer.pieces, continues=[1]).push([world]) == "world"
    assert Detokenizer(tokenizer.pieces).push([hello, end_inst, world]) == "Hello world"
    assert Detokenizer(tokenizer.pieces).push([1, hello]) == "Hello"


def test_a_character_begun_by_the_prompt_is_returned_once_whole() -> None:
    tokenizer = TOKENIZERS["v3"]
    first, second, third = (byte_id(tokenizer, b) for b in "日".encode())
    detokenizer = Detokenizer(tokenizer.pieces, continues=[1, first, second])
    assert detokenizer.push([third]) == "日"
    broken = Detokenizer(tokenizer.pieces, continues=[1, first, second])
    assert broken.push([tokenizer.pieces.names.index("a")]) == "a"


def test_offsets_say_where_each_tokens_text_begins() -> None:
    tokenizer = TOKENIZERS["v3"]
    ids = [*tokenizer.encode("a é", bos=False), byte_id(tokenizer, 0xE2), tokenizer.pieces.names.index("b"), 2, 40_000]
    detokenizer = Detokenizer(tokenizer.pieces)
    placed = [detokenizer.push_token(i) for i in ids]
    text = "".join(t for _, t in placed)
    assert text == "a é�b"
    assert placed[-3][0] == text.index("b"), "the broken byte before it is text too"
    assert placed[-1] == (len(text), ""), "an id beyond the tokenizer adds nothing"
