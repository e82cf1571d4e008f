"""Incremental detokenization equals the reference's decode of all ids at once, however they are split, for every kind of vocabulary."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor
from support.paths import DEMO_MODEL
from support.vocabularies.tekken import write_tekken
from support.vocabularies.tokenizers import reference, write_tokenizer

from cluster.text.output.detokenizer import Detokenizer
from cluster.text.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
DEMO = DEMO_MODEL / "tokenizer.model.v3"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "demo": DEMO,
}
NAMES = [*FILES, "tekken", "llama3", "smollm2"]
# Their reference shows a run of bytes with one bad byte as bad bytes only, which no stream can do.
NAMES_WITHOUT_REFERENCE = ["llama2", "metaspace"]
Decode = Callable[[Sequence[int]], str]
Tokenizers = dict[str, tuple[Tokenizer, Decode]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """By name, ours and the reference's decode."""
    found: Tokenizers = {}
    for name, path in FILES.items():
        ours, processor = open_tokenizer(path, "v1"), SentencePieceProcessor(model_file=str(path))
        found[name] = ours, lambda ids, processor=processor: str(processor.decode(list(ids)))
    folder = tmp_path_factory.mktemp("tokenizers")
    path = write_tekken(folder / "tekken", "v3") / "tekken.json"
    tekken = Tekkenizer.from_file(path)
    found["tekken"] = open_tokenizer(path), lambda ids: str(tekken.decode(list(ids)))
    for name in ("llama3", "smollm2"):
        ours, fast = load_tokenizer(write_tokenizer(folder / name, name)), reference(name)
        found[name] = ours, lambda ids, fast=fast: str(fast.decode(list(ids), skip_special_tokens=True))
    for name in NAMES_WITHOUT_REFERENCE:
        ours = load_tokenizer(write_tokenizer(folder / name, name))
        found[name] = ours, lambda ids, ours=ours: str(ours.decode(ids))
    return found


# Bytes at the edges of UTF-8: leads, trails, overlong, surrogate and out-of-range forms.
EDGE_BYTES = bytes.fromhex("00 41 80 8F 90 9F A0 BF C0 C2 DF E0 E2 ED EF F0 F4 F5 FF")
MULTI_BYTE = "naïve 日本語 😀👩‍👩‍👧 ᚠ\u0301 tab\t\n\n  two  spaces Ω≈ç√∫ \U00010348"


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    """The token of one byte, whole character or not."""
    pieces = tokenizer.pieces
    return next(
        i for i in range(tokenizer.vocab_size) if pieces.bytes_of(i) == bytes((byte,)) and _is_byte(tokenizer, i)
    )


def _is_byte(tokenizer: Tokenizer, token_id: int) -> bool:
    return tokenizer.pieces.byte_level or tokenizer.pieces.partial[token_id] is not None


@cache
def id_sequences(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    edge = st.sampled_from([byte_id(tokenizer, b) for b in EDGE_BYTES])
    special = st.sampled_from([0, *sorted(tokenizer.control_token_ids)[:6]])
    spaces = st.sampled_from([i for i, s in enumerate(tokenizer.pieces.surfaces) if s and not s.strip(" ")][:4])
    return st.lists(st.one_of(any_id, edge, edge, special, spaces), max_size=20)


@pytest.mark.parametrize("name", [*NAMES, *NAMES_WITHOUT_REFERENCE])
@settings(max_examples=60)
@given(data=st.data())
def test_any_ids_in_any_split_equal_the_whole(name: str, tokenizers: Tokenizers, data: st.DataObject) -> None:
    tokenizer, decode = tokenizers[name]
    ids = data.draw(id_sequences(tokenizer))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    detokenizer = Detokenizer(tokenizer.pieces)
    text, begin = "", 0
    for cut in [*cuts, len(ids)]:
        text += detokenizer.push(ids[begin:cut])
        begin = cut
    text += detokenizer.flush()
    assert text == decode(ids) == tokenizer.decode(ids)
    assert detokenizer.num_chars == len(text)


@pytest.mark.parametrize("name", [*NAMES, *NAMES_WITHOUT_REFERENCE])
@settings(max_examples=25)
@given(data=st.data())
def test_returned_text_is_final(name: str, tokenizers: Tokenizers, data: st.DataObject) -> None:
    tokenizer, decode = tokenizers[name]
    ids = data.draw(id_sequences(tokenizer))
    detokenizer = Detokenizer(tokenizer.pieces)
    shown, what_follows = "", [data.draw(id_sequences(tokenizer)) for _ in range(3)]
    for i, token_id in enumerate(ids):
        shown += detokenizer.push([token_id])
        for more in what_follows:
            assert decode([*ids[: i + 1], *more]).startswith(shown)


@pytest.mark.parametrize("name", [*NAMES, *NAMES_WITHOUT_REFERENCE])
@settings(max_examples=25)
@given(data=st.data())
def test_after_a_prompt_it_is_the_whole_text_without_the_prompt(
    name: str, tokenizers: Tokenizers, data: st.DataObject
) -> None:
    tokenizer, decode = tokenizers[name]
    prompt, output = data.draw(id_sequences(tokenizer)), data.draw(id_sequences(tokenizer))
    detokenizer = Detokenizer(tokenizer.pieces, continues=prompt)
    text = detokenizer.push(output) + detokenizer.flush()
    whole, before = decode(prompt + output), decode(prompt)
    if whole.startswith(before):
        assert text == whole[len(before) :]
    else:  # our first bytes completed a character that the prompt's decode shows as U+FFFD
        settled = before.rstrip("�")
        assert whole == settled + whole[len(settled) :]
        assert whole.endswith(text)
        assert text


@pytest.mark.parametrize("name", [*NAMES, *NAMES_WITHOUT_REFERENCE])
def test_multi_byte_text_comes_in_whole_characters(name: str, tokenizers: Tokenizers) -> None:
    tokenizer, _ = tokenizers[name]
    ids = tokenizer.encode(MULTI_BYTE)
    assert any(tokenizer.pieces.partial[i] is not None for i in ids), "the text must need byte tokens to test anything"
    detokenizer = Detokenizer(tokenizer.pieces)
    parts = [detokenizer.push([i]) for i in ids] + [detokenizer.flush()]
    assert "".join(parts) == MULTI_BYTE
    assert not any("�" in p for p in parts)


def test_the_space_that_opens_a_text(tokenizers: Tokenizers) -> None:
    tokenizer, _ = tokenizers["v3"]
    hello, world = tokenizer.pieces.names.index("▁Hello"), tokenizer.pieces.names.index("▁world")
    end_inst = tokenizer.pieces.names.index("[/INST]")
    assert Detokenizer(tokenizer.pieces, continues=[1, hello]).push([world]) == " world"
    assert Detokenizer(tokenizer.pieces, continues=[1]).push([world]) == "world"
    assert Detokenizer(tokenizer.pieces).push([hello, end_inst, world]) == "Hello world"
    assert Detokenizer(tokenizer.pieces).push([1, hello]) == "Hello"


def test_a_character_begun_by_the_prompt_is_returned_once_whole(tokenizers: Tokenizers) -> None:
    tokenizer, _ = tokenizers["v3"]
    first, second, third = (byte_id(tokenizer, b) for b in "日".encode())
    detokenizer = Detokenizer(tokenizer.pieces, continues=[1, first, second])
    assert detokenizer.push([third]) == "日"
    broken = Detokenizer(tokenizer.pieces, continues=[1, first, second])
    assert broken.push([tokenizer.pieces.names.index("a")]) == "a"


def test_offsets_say_where_each_tokens_text_begins(tokenizers: Tokenizers) -> None:
    tokenizer, _ = tokenizers["v3"]
    ids = [*tokenizer.encode("a é", bos=False), byte_id(tokenizer, 0xE2), tokenizer.pieces.names.index("b"), 2, 40_000]
    detokenizer = Detokenizer(tokenizer.pieces)
    placed = [detokenizer.push_token(i) for i in ids]
    text = "".join(t for _, t in placed)
    assert text == "a é�b"
    assert placed[-3][0] == text.index("b"), "the broken byte before it is text too"
    assert placed[-1] == (len(text), ""), "an id beyond the tokenizer adds nothing"
