"""Special tokens in prompts: the same ids and the same text as transformers, BOS once, and nothing of it in `encode`."""

from pathlib import Path

import pytest
from support.paths import DEMO_MODEL
from support.vocabularies.chatml import IM_END, IM_START, MODEL_VOCAB_SIZE, TOOL, chatml_reference, write_chatml

from cluster.text.output.detokenizer import Detokenizer
from cluster.text.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

TEXTS = [
    "<|im_start|>user\nhi<|im_end|>\n",
    "hello", " x", "  two spaces", "", "\n", "ça va 日本 😀",
    "<s>hello", "<s> hello", "hello</s>", "a<unk>b", "x</s>y</s>",
    "<|im_end|><|im_end|>", "  <|im_end|>  ", "<|im_start|", "<<|im_end|>>", "<|im_start|><|im_start|>user",
    "<tool_call>{\"a\": 1}</tool_call>", "a <tool_call> b",
    "<pad>   after", "before   <pad>", "<pad><pad> x",
]  # fmt: skip


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_chatml(tmp_path_factory.mktemp("chatml"))
    return load_tokenizer(folder, model_vocab_size=MODEL_VOCAB_SIZE)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL)


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_has_transformers_ids(chatml: Tokenizer, text: str) -> None:
    expected = chatml_reference()(text, add_special_tokens=False).input_ids
    assert chatml.encode_prompt(text, add_special_tokens=False) == expected
    assert chatml.encode_prompt(text) == (expected if expected[:1] == [1] else [1, *expected]), "BOS comes once"


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_may_name_no_token_has_none(chatml: Tokenizer, text: str) -> None:
    ids = chatml.encode(text, bos=False)
    assert not {0, 1, 2, IM_END, IM_START, TOOL} & set(ids)
    assert chatml.decode(ids) == text


def test_the_ids_of_the_report(chatml: Tokenizer) -> None:
    assert chatml.encode_prompt(TEXTS[0]) == [1, 32001, 2188, 13, 5365, 32000, 28705, 13]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<s>[INST] hi[/INST]", [1, 3, "hi", 4]),
        ("[INST] hi[/INST] hi</s>", [1, 3, "hi", 4, "hi", 2]),
        ("hi", [1, "hi"]),
        ("<s><s>hi", [1, 1, "continued"]),
        ("<unk>", [1, 0]),
        ("[INST", [1, "[INST"]),
    ],
)
def test_mistrals_own_layout(demo: Tokenizer, text: str, expected: list[int | str]) -> None:
    """A text after a control token is written with its own space, as mistral-common's templates do."""
    ids: list[int] = []
    for part in expected:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += demo.encode_continuation("hi") if part == "continued" else demo.encode(part, bos=False)
    assert demo.encode_prompt(text) == ids


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({}, [1, 12014]),
        ({"add_bos_token": False}, [12014]),
        ({"add_eos_token": True}, [1, 12014, IM_END]),
        ({"bos_token": "<|im_start|>"}, [IM_START, 12014]),
    ],
)
def test_what_a_checkpoint_adds(tmp_path: Path, config: dict[str, object], ids: list[int]) -> None:
    tokenizer = load_tokenizer(write_chatml(tmp_path, **config))
    assert tokenizer.encode_prompt("hi") == ids
    assert tokenizer.encode_prompt("hi", add_special_tokens=False) == [12014]


OUTPUTS = [
    [TOOL, 2188, IM_END],
    [2188, TOOL, 28705, 13],
    [IM_START, 2188, TOOL, TOOL, 5365, 1],
    [1, 2188, 5365],
    [0, 2188],
    [TOOL],
]


@pytest.mark.parametrize("ids", OUTPUTS)
def test_only_special_tokens_are_left_out_of_the_output(chatml: Tokenizer, ids: list[int]) -> None:
    expected = chatml_reference().decode(ids, skip_special_tokens=True)
    assert chatml.decode(ids) == expected
    detokenizer = Detokenizer(chatml.pieces)
    assert "".join([detokenizer.push([i]) for i in ids]) + detokenizer.flush() == expected


@pytest.mark.parametrize("ids", [*OUTPUTS, [2188, 2], [2, 2188], [IM_END, 28705, 13], [IM_START, 0, TOOL, IM_END]])
def test_with_special_tokens_the_output_is_that_of_transformers(chatml: Tokenizer, ids: list[int]) -> None:
    expected = chatml_reference().decode(ids, skip_special_tokens=False)
    shown = chatml.shown_pieces(shows_special=True)
    detokenizer = Detokenizer(shown)
    assert "".join([detokenizer.push([i]) for i in ids]) + detokenizer.flush() == expected
    for cut in range(1, len(ids)):
        before = chatml_reference().decode(ids[:cut], skip_special_tokens=False)
        assert Detokenizer(shown, continues=ids[:cut]).push(ids[cut:]) == expected[len(before) :]
    assert (
        b"".join(bytes(chatml.token_bytes(i, shows_special=True) or ()) for i in ids).decode().strip()
        == expected.strip()
    )


@pytest.mark.parametrize(
    ("token_id", "text", "token_bytes"),
    [
        (IM_START, "<|im_start|>", None),
        (TOOL, "<tool_call>", list(b"<tool_call>")),
        (1, "<s>", None),
        (0, "<unk>", None),
        (32_010, "<|32010|>", None),
    ],
)
def test_every_token_with_a_name_shows_it(chatml: Tokenizer, token_id: int, text: str, token_bytes: object) -> None:
    assert (chatml.token_text(token_id), chatml.token_bytes(token_id)) == (text, token_bytes)


def test_an_added_token_that_the_model_lacks_is_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(write_chatml(tmp_path), model_vocab_size=32_002)
    assert tokenizer.vocab_size == 32_002
    assert tokenizer.encode_prompt("<tool_call>") == [1, *tokenizer.encode("<tool_call>", bos=False)]
    assert "'<tool_call>' is plain text here: its id is beyond the model's" in caplog.text


def test_special_tokens_of_any_kind_are_found_by_name(chatml: Tokenizer) -> None:
    assert [chatml.control_token_id(name) for name in ("<|im_end|>", "</s>", "<tool_call>", "")] == [
        IM_END, 2, None, None,
    ]  # fmt: skip
    plain = open_tokenizer(chatml.path)
    assert plain.control_token_id("<|im_end|>") is None


def test_words_that_are_special_tokens_are_banned_as_such(chatml: Tokenizer) -> None:
    assert (IM_END,) in chatml.bad_words_ids(["<|im_end|>"])
