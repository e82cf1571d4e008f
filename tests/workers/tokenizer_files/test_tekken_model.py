"""Mistral's tekken vocabulary: ids and bytes equal to transformers' conversion of the same file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies.tekken import write_tekken
from transformers.integrations.mistral.tokenizer import MistralConverter

from workers.errors import ConfigError, RequestError
from workers.tokenizer_files.byte_level import to_bytes
from workers.tokenizer_files.tekken_model import TekkenModel

TEXTS = [
    "The quick brown fox, it's 12345!\n\n  def f(x):\n\treturn x",
    "naïve 日本語 😀👩‍👩‍👧 éÉn ḿ'ś हिन्दी's ǅ",
    "", " ", "   ", "\n \n", "[INST] hi[/INST]", "<s></s>", "a//b\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tekken(tmp_path_factory.mktemp("tekken"), "v3") / "tekken.json"


@pytest.fixture(scope="module")
def model(path: Path) -> TekkenModel:
    return TekkenModel(path)


@pytest.fixture(scope="module")
def converted(path: Path) -> Any:
    return MistralConverter(str(path)).converted()


def check(model: TekkenModel, converted: Any, text: str) -> None:
    converted.encode_special_tokens = True  # a text names none
    ids = model.encode(text)
    assert ids == model.encode_continuation(text) == converted.encode(text, add_special_tokens=False).ids
    assert b"".join(model.pieces.bytes_of(i) for i in ids) == text.encode()
    assert not any(model.pieces.is_control[i] for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_a_table(model: TekkenModel, converted: Any, text: str) -> None:
    check(model, converted, text)


@settings(max_examples=100)
@given(text=st.text())
def test_ids_of_any_text(model: TekkenModel, converted: Any, text: str) -> None:
    check(model, converted, text)


def test_pieces(model: TekkenModel, converted: Any) -> None:
    pieces = model.pieces
    assert pieces.names[:5] == ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    assert (model.special.bos, model.special.eos, model.special.unk, model.special.ends) == (1, 2, 0, (2,))
    num_control = sum(pieces.is_control)
    for i in range(num_control, len(pieces.names)):
        assert pieces.bytes_of(i) == to_bytes(converted.id_to_token(i))
    assert [pieces.bytes_of(num_control + b) for b in range(256)] == [bytes((b,)) for b in range(256)]
    assert model.version == "v3"


def test_texts_that_cannot_be_encoded(model: TekkenModel) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        model.encode("half \ud83d of a pair")
    with pytest.raises(RequestError, match="too many spaces in a row"):
        model.encode(" " * 2_000_000)


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"vocab": 7},
        {"config": {}},
        {"vocab": []},
        {"vocab": [{"rank": 1}]},
        {"config": {"version": "v99"}},
    ],
)
def test_a_damaged_file_is_named(path: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=r"tekken\.json is not a tekken tokenizer \(\w+"):
        TekkenModel(tmp_path / "tekken.json")
