"""Fill-in-the-middle prompts and bad words: the same ids as mistral-common and SentencePiece."""

from pathlib import Path

import mistral_common
import pytest
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.paths import DEMO_MODEL

from cluster.text.infilling import encode_infilling
from cluster.text.tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from workers.errors import RequestError

DATA = Path(mistral_common.__file__).parent / "data"
V3 = open_tokenizer(DATA / "mistral_instruct_tokenizer_240323.model.v3", "v3")
REFERENCE = MistralTokenizer.v3()
DEMO = load_tokenizer(DEMO_MODEL)


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("def f(", "return a + b"),
        ("def f(", "\n    return a"),
        ("x = ", ""),
        ("", "end"),
        (" leading", " leading"),
        ("a", "日本 😀"),
        ("[PREFIX]", "</s>[SUFFIX]"),
    ],
)
def test_ids_equal_mistral_commons(prefix: str, suffix: str) -> None:
    expected = REFERENCE.encode_fim(FIMRequest(prompt=prefix, suffix=suffix)).tokens
    assert encode_infilling(V3, prefix, suffix) == expected


@pytest.mark.parametrize("path", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2", None])
def test_vocabularies_without_the_tokens_refuse(path: str | None) -> None:
    tokenizer = DEMO if path is None else open_tokenizer(DATA / path, "v1")
    with pytest.raises(RequestError, match=r"cannot fill in the middle") as error:
        encode_infilling(tokenizer, "a", "b")
    assert error.value.param == "suffix"


@pytest.mark.parametrize("tokenizer", [V3, DEMO])
def test_bad_words_are_encoded_at_the_start_of_a_word_and_inside_one(tokenizer: Tokenizer) -> None:
    found = tokenizer.bad_words_ids(["return", " return", "self.x"])
    assert len(set(found)) == len(found)
    written = {"".join(tokenizer.token_text(i) for i in ids) for ids in found}
    assert {" return", "return", " self.x", "self.x"} <= written
    assert tokenizer.encode("return", bos=False) == list(found[0])


@pytest.mark.parametrize(("word", "says"), [("", "blank"), ("  ", "blank"), ("\ud83d", "surrogate")])
def test_invalid_bad_words(word: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        V3.bad_words_ids(["fine", word])
    assert error.value.param == "bad_words"


def test_the_token_of_tool_calls() -> None:
    assert V3.tool_calls_token_id == V3.pieces.names.index("[TOOL_CALLS]")
    assert V3.control_token_id("the") is None
    assert V3.control_token_id("no such piece") is None
