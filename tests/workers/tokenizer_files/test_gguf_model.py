"""Tokenizers of GGUF metadata: the same ids as llama.cpp and SentencePiece, end tokens, and what is refused by name.

The table holds what llama.cpp (llama-cpp-python 0.3.36) made of the same vocabulary: one text a column, tokens between bars. With the
vocabulary of SmolLM2 under 26 names of splits, and with Mistral's, both agreed on 3,000 random texts each (deepseek-coder: all but one).
"""

from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies.gguf_vocabulary import PLAIN, SPECIAL, byte_level_metadata, sentencepiece_metadata

from cluster.text.tokenizer import Tokenizer
from cluster.text.tokenizer_settings import TokenizerSettings
from workers.errors import ConfigError
from workers.tokenizer_files.gguf_model import gguf_model
from workers.tokenizer_files.gguf_splits import SPLITS
from workers.tokenizer_files.sentencepiece_model import SentencePieceModel

DATA = Path(mistral_common.__file__).parent / "data"
V1, V3 = DATA / "tokenizer.model.v1", DATA / "mistral_instruct_tokenizer_240323.model.v3"
TEXTS = (
    "hello world it's IT'S",
    "123456 123456 ²2 ½",
    "   hello\n\n \n\t\t x",
    "x==//.\n ==(.)",
    "日本語één Één aBAb éÉn",
    "$5 ($5)",
    "<tool_call>hello",
)
BLANKS, SIGNS = "ĠĠ|Ġ|hello|ĊĊ|ĠĊ|ĉĉ|Ġ|x", "x|==|//|.Ċ|Ġ|==|(|.|)"
SIGNS_APART = "x|==|//|.|Ċ|Ġ|==|(|.|)"
LETTERS = "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|aB|Ab|Ġ|Ã©Ãīn"
LETTERS_WHOLE = "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃīÃ©n|Ġ|aB|Ab|Ġ|Ã©Ãīn"
ONE_BY_ONE, BY_THREE = "1|2|3|4|5|6|Ġ|1|2|3|4|5|6|Ġ|Â²|2|Ġ|Â½", "123|4|5|6|Ġ|123|4|5|6|Ġ|Â²2|Ġ|Â½"
REST = ("$|5|Ġ(|$|5|)", "<tool_call>|hello")
NO_S, LOWER_S, ANY_S = (f"hello|Ġworld|Ġit|{s}" for s in ("'|s|Ġ|I|T|'|S", "'s|Ġ|I|T|'|S", "'s|Ġ|I|T|'S"))
LLAMA_CPP = {
    "default": (NO_S, BY_THREE, BLANKS, SIGNS_APART, LETTERS, "$|5|Ġ|(|$|5|)", REST[1]),
    "gpt-2": (LOWER_S, "123456|Ġ|123456|Ġ|Â²2|Ġ|Â½", BLANKS, SIGNS_APART, LETTERS, *REST),
    "llama-bpe": (ANY_S, BY_THREE, "ĠĠ|Ġhello|ĊĊ|ĠĊ|ĉĉ|Ġ|x", SIGNS, LETTERS_WHOLE, *REST),
    "dbrx": (ANY_S, BY_THREE, BLANKS, SIGNS, LETTERS, *REST),
    "smollm": (LOWER_S, ONE_BY_ONE, BLANKS, SIGNS_APART, LETTERS, *REST),
    "qwen2": (ANY_S, ONE_BY_ONE, BLANKS, SIGNS, LETTERS, *REST),
    # Mistral's expression keeps é and Én apart; llama.cpp's joins them.
    "tekken": (ANY_S, ONE_BY_ONE, "ĠĠ|Ġhello|ĊĊ|ĠĊ|ĉĉ|Ġ|x", SIGNS, "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃīÃ©n|Ġ|a|B|Ab|Ġ|Ã©|Ã|ī|n", *REST),
    "deepseek-coder": (NO_S, ONE_BY_ONE, "ĠĠ|Ġ|hello|Ċ|Ċ|Ġ|Ċ|ĉĉ|Ġ|x", SIGNS_APART, LETTERS, *REST),
    "deepseek-llm": (
        "hello|Ġworld|Ġit|'|s|Ġ|I|T|'|S",
        "123456|Ġ|123456|Ġ|Â²2|Ġ|Â½",
        "ĠĠ|Ġ|hello|Ċ|Ċ|Ġ|Ċ|ĉĉ|Ġ|x",
        "x|==|//|.|Ċ|Ġ|==|(|.|)",
        "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|aB|Ab|Ġ|Ã©Ãī|n",
        "$|5|Ġ(|$|5|)",
        "<tool_call>|hello",
    ),
    "deepseek-v3": (
        "hello|Ġworld|Ġit|'s|Ġ|I|T|'S",
        "123|4|5|6|Ġ|123|4|5|6|Ġ|Â²2|Ġ|Â½",
        "ĠĠ|Ġ|hello|ĊĊ|ĠĊ|ĉĉ|Ġ|x",
        "x|==|//|.Ċ|Ġ|==|(|.|)",
        "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|aB|Ab|Ġ|Ã©Ãīn",
        "$|5|Ġ(|$|5|)",
        "<tool_call>|hello",
    ),
    "seed-coder": (
        "hello|Ġworld|Ġit|'s|Ġ|I|T|'S",
        "1|2|3|4|5|6|Ġ|1|2|3|4|5|6|Ġ|Â²|2|Ġ|Â½",
        "ĠĠ|Ġ|hello|ĊĊ|ĠĊ|ĉĉ|Ġ|x",
        "x|==|//|.|Ċ|Ġ|==|(|.|)",
        "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|aB|Ab|Ġ|Ã©Ãīn",
        "$|5|Ġ(|$|5|)",
        "<tool_call>|hello",
    ),
    "gpt-4o": (
        "hello|Ġworld|Ġit|'s|Ġ|I|T|'S",
        "123|4|5|6|Ġ|123|4|5|6|Ġ|Â²2|Ġ|Â½",
        "ĠĠ|Ġ|hello|ĊĊ|ĠĊ|ĉĉ|Ġ|x",
        "x|==|//|.Ċ|Ġ|==|(|.|)",
        "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|a|B|Ab|Ġ|Ã©Ãīn",
        "$|5|Ġ(|$|5|)",
        "<tool_call>|hello",
    ),
    "poro-chat": (
        "hello|Ġworld|Ġit|'s|Ġ|I|T|'S",
        "123456|Ġ|123456|Ġ|Â²2|Ġ|Â½",
        "ĠĠ|Ġ|hello|ĊĊ|ĠĊ|ĉĉ|Ġ|x",
        "x|==|//|.Ċ|Ġ|==|(|.|)",
        "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|aB|Ab|Ġ|Ã©Ãīn",
        "$5|Ġ(|$5|)",
        "<tool_call>|hello",
    ),
    "viking": (
        "hello|Ġworld|Ġit|'s|Ġ|I|T|'S",
        "1|2|3|4|5|6|Ġ|1|2|3|4|5|6|Ġ|Â²|2|Ġ|Â½",
        "ĠĠ|Ġ|hello|ĊĊ|ĠĊ|ĉĉ|Ġ|x",
        "x|==|//|.Ċ|Ġ|==|(|.|)",
        "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|aB|Ab|Ġ|Ã©Ãīn",
        "$|5|Ġ(|$|5|)",
        "<tool_call>|hello",
    ),
    "superbpe": (
        "hello|Ġworld|Ġit|'s|Ġ|I|T|'S",
        "123|4|5|6|Ġ|123|4|5|6|Ġ|Â²2|Ġ|Â½",
        "ĠĠĠ|hello|ĊĊ|ĠĊ|ĉĉ|Ġ|x",
        "x|==|//|.Ċ|Ġ|==|(|.|)",
        "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|aB|Ab|Ġ|Ã©Ãīn",
        "$|5|Ġ(|$|5|)",
        "<tool_call>|hello",
    ),
    "falcon": (
        "hello|Ġworld|Ġit|'|s|Ġ|I|T|'|S",
        "123|4|5|6|Ġ|123|4|5|6|Ġ|Â²2|Ġ|Â½",
        "ĠĠ|Ġ|hello|ĊĊ|ĠĊ|ĉĉ|Ġ|x",
        "x|==|//|.|Ċ|Ġ|==|(|.|)",
        "æĹ¥æľ¬èªŀ|Ã©|Ã©|n|ĠÃī|Ã©|n|Ġ|aB|Ab|Ġ|Ã©Ãīn",
        "$|5|Ġ|(|$|5|)",
        "<tool_call>|hello",
    ),
}  # fmt: skip


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer:
    model = gguf_model(metadata, name="x.gguf")
    own = TokenizerSettings(added_tokens=dict(model.added_tokens))
    return Tokenizer(model, path=Path("x.gguf"), template_version=None, settings=own)


@pytest.mark.parametrize("pre", LLAMA_CPP)
def test_ids_equal_those_of_llama_cpp(pre: str) -> None:
    tokenizer = tokenizer_of(byte_level_metadata(pre))
    for text, expected in zip(TEXTS, LLAMA_CPP[pre], strict=True):
        ids = tokenizer.encode_prompt(text, add_special_tokens=False)
        assert "|".join(tokenizer.pieces.names[i] for i in ids) == expected
        assert tokenizer.decode(ids) == text


def test_a_file_without_a_name_of_its_splits_has_the_default_ones() -> None:
    unnamed, named = (tokenizer_of(byte_level_metadata(pre)) for pre in (None, "default"))
    assert [unnamed.encode(text) for text in TEXTS] == [named.encode(text) for text in TEXTS]


@pytest.mark.parametrize("pre", SPLITS)
def test_every_split_loses_nothing(pre: str) -> None:
    tokenizer = tokenizer_of(byte_level_metadata(pre))
    for text in (*TEXTS, "\x00\u2028 ½ é\u0301👩‍👩‍👧\r\n"):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_special_and_user_defined_tokens() -> None:
    tokenizer = tokenizer_of(byte_level_metadata("smollm"))
    end, plain = SPECIAL.index("<|im_end|>"), len(SPECIAL)
    assert tokenizer.encode_prompt(f"{PLAIN}<|im_end|>") == [plain, end]
    assert end not in tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([plain, end]) == PLAIN
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)


@pytest.mark.parametrize(
    ("metadata", "prefix"),
    [
        (byte_level_metadata("smollm"), []),
        (byte_level_metadata("smollm", add_bos_token=True), [1]),
        (byte_level_metadata("llama-bpe"), [1]),
        (byte_level_metadata("llama-bpe", add_bos_token=False), []),
        (byte_level_metadata("tekken"), [1]),
        (sentencepiece_metadata(V1), [1]),
        (sentencepiece_metadata(V1, add_bos_token=False), []),
    ],
)
def test_what_a_prompt_begins_with(metadata: dict[str, Any], prefix: list[int]) -> None:
    tokenizer = tokenizer_of(metadata)
    ids = tokenizer.encode_prompt("hello", add_special_tokens=False)
    assert tokenizer.encode_prompt("hello") == [*prefix, *ids]
    assert tokenizer.adds_bos == bool(prefix)


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        (byte_level_metadata("smollm"), (0, 2)),
        (byte_level_metadata("smollm", eos_token_id=2), (2, 0)),
        (byte_level_metadata("smollm", eot_token_id=9, eom_token_id=8), (0, 9, 8, 2)),
        (byte_level_metadata("smollm", eot_token_id=10**6), (0, 2)),
        (sentencepiece_metadata(V1), (2,)),
    ],
)
def test_what_ends_an_answer(metadata: dict[str, Any], ends: tuple[int, ...]) -> None:
    assert gguf_model(metadata, name="x").special.ends == ends


@pytest.mark.parametrize("path", [V1, V3], ids=["v1", "v3"])
def test_a_sentencepiece_vocabulary_is_the_same_again(path: Path) -> None:
    found, original = gguf_model(sentencepiece_metadata(path), name="x"), SentencePieceModel(path)
    assert found.pieces == original.pieces
    assert (found.special.bos, found.special.eos, found.special.unk) == (1, 2, 0)

    @settings(max_examples=100)
    @given(text=st.text())
    def same(text: str) -> None:
        assert found.encode(text) == original.encode(text)
        assert found.encode_continuation(text) == original.encode_continuation(text)

    same()


def test_a_sentencepiece_vocabulary_without_a_first_space() -> None:
    found = tokenizer_of(sentencepiece_metadata(V1, add_space_prefix=False))
    names = found.pieces.names
    assert [names[i] for i in found.encode("hello there", bos=False)] == ["hello", "▁there"]
    assert found.encode("hello", bos=False) == found.encode_continuation("hello")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "x has no tokenizer, which is not supported"),
        ({"tokenizer.ggml.model": "t5"}, "x has the tokenizer 't5', which is not supported"),
        ({"tokenizer.ggml.model": "gpt2"}, "x has no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [1]}, "lists a token that is not text"),
        (byte_level_metadata("smollm") | {"tokenizer.ggml.pre": []}, r"splits words as \[\]"),
        (byte_level_metadata("unheard"), r"splits words as 'unheard' \(tokenizer.ggml.pre\), which is not known"),
        (byte_level_metadata("smollm", merges=[]), "x has no tokenizer.ggml.merges"),
        (byte_level_metadata("smollm", token_type=[1]), "lists a token twice or without a type"),
        (byte_level_metadata("smollm", merges=[1]), "lists a merge that is not text"),
        (sentencepiece_metadata(V1, scores=["a"]), "a score of a token that is not a finite number"),
        (sentencepiece_metadata(V1, scores=[float("nan")]), "a score of a token that is not a finite number"),
        (sentencepiece_metadata(V1, scores=[0.0]), "has 1 scores for 32000 tokens"),
        (sentencepiece_metadata(V1, tokens=["a", "a"], token_type=[1, 1]), "lists a token twice"),
    ],
)
def test_what_is_refused(metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        gguf_model(metadata, name="x")
    assert error.value.remedy
