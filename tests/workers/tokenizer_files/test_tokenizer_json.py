"""A vocabulary in Hugging Face's format: what each token adds, no special token from a text, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from support.vocabularies.tokenizers import KINDS, NAMED, PLAIN, SPECIAL, reference, trained
from tokenizers import Tokenizer

from workers.errors import ConfigError, RequestError
from workers.tokenizer_files.byte_level import BYTE_OF, CHAR_OF, to_bytes
from workers.tokenizer_files.pieces import PieceTable, SpecialIds
from workers.tokenizer_files.tokenizer_json import TokenizerJsonModel, open_tokenizer_json


def spec_of(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(trained(kind))
    return spec


def model_of(kind: str) -> TokenizerJsonModel:
    return TokenizerJsonModel(spec_of(kind), name=kind)


def pieces_of(kind: str) -> PieceTable:
    model = model_of(kind)
    return model.pieces.with_added(model.added_tokens)


def test_the_alphabet_is_that_of_gpt_2() -> None:
    assert (CHAR_OF[ord(" ")], CHAR_OF[ord("\n")], CHAR_OF[ord("a")], CHAR_OF[0xAD], CHAR_OF[0xFF]) == tuple("ĠĊaŃÿ")
    assert len(BYTE_OF) == 256
    assert to_bytes("Ġthe") == b" the"
    assert to_bytes("<|x y|>") == b"<|x y|>", "no byte is written as a space: the name is text"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_token_adds_is_what_transformers_adds(kind: str) -> None:
    pieces, fast = pieces_of(kind), reference(kind)
    assert len(pieces.names) == len(fast)
    before = fast("x", add_special_tokens=False).input_ids
    shown = fast.decode(before)
    for i, name in enumerate(pieces.names):
        assert name == fast.convert_ids_to_tokens(i)
        assert pieces.is_control[i] == (name in SPECIAL[kind])
        if pieces.partial[i] is None:
            assert pieces.surfaces[i] == fast.decode([*before, i], skip_special_tokens=True)[len(shown) :]
    assert pieces.byte_level == (kind in ("llama3", "smollm2"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_can_be_written(kind: str) -> None:
    pieces = pieces_of(kind)
    assert {pieces.bytes_of(i) for i in range(len(pieces.names))} >= {bytes((b,)) for b in range(256)} - {b"\xc0"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_special_token(kind: str) -> None:
    model = model_of(kind)
    special = {i for i, control in enumerate(pieces_of(kind).is_control) if control}
    for name in (*SPECIAL[kind], PLAIN, "<unk>", "<s>"):
        for text in (name, f"a{name}b", f" {name} {name}", name * 3):
            for ids in (model.encode(text), model.encode_continuation(text)):
                assert not special & set(ids)


def test_merges_that_lead_to_a_special_token_are_left_out() -> None:
    """transformers generates merges for every piece, special ones too."""
    spec = spec_of("llama2")
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    size = max(token["id"] for token in spec["added_tokens"]) + 1
    for i, piece in enumerate(("<", ">", "<s")):
        vocab[piece] = size + i
    merges[:0] = [["<", "s"], ["<s", ">"]]
    open_to_all = Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
    assert open_to_all.encode("<s>", add_special_tokens=False).ids[-1] == 1
    assert TokenizerJsonModel(spec, name="x").encode("<s>")[-2:] == [size + 2, size + 1]


@pytest.mark.parametrize("kind", ["llama2", "metaspace", "unigram"])
def test_text_that_follows_other_text_gets_no_space(kind: str) -> None:
    model = model_of(kind)
    table = model.pieces
    for text, start in (("quick", "▁"), (" quick", "▁")):
        assert table.names[model.encode(text)[0]].startswith(start)
    assert not table.names[model.encode_continuation("quick")[0]].startswith("▁")
    assert table.names[model.encode_continuation(" quick")[0]].startswith("▁")


@pytest.mark.parametrize(
    ("post_processor", "prefix", "suffix"),
    [
        (None, (), ()),
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, (), ()),
        ({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True, "add_prefix_space": True}, (1,), (2,)),
    ],
)  # fmt: skip
def test_what_the_file_puts_around_a_prompt(
    post_processor: Any, prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> None:
    model = TokenizerJsonModel(spec_of("metaspace") | {"post_processor": post_processor}, name="x")
    assert (model.special.prefix, model.special.suffix) == (prefix, suffix)
    assert model.special == SpecialIds(unk=0, prefix=prefix, suffix=suffix)


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_post_processor(kind: str) -> None:
    expected = reference(kind)("x").input_ids
    ids = model_of(kind)
    assert [*(ids.special.prefix or ()), *ids.encode("x"), *(ids.special.suffix or ())] == expected
    assert NAMED[kind]["eos_token"] in ids.added_tokens


def test_characters_that_a_normalizer_joins_are_counted() -> None:
    spec = spec_of("llama3")
    assert TokenizerJsonModel(spec, name="x").pieces.max_shrink == 1
    assert model_of("llama2").pieces.max_shrink == 1
    assert TokenizerJsonModel(spec | {"normalizer": {"type": "NFC"}}, name="x").pieces.max_shrink == 4
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    assert TokenizerJsonModel(spec | {"normalizer": strip}, name="x").pieces.max_shrink > 1_000


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(spec_of("metaspace")) | changes


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (changed(model={"type": "WordPiece", "vocab": {"a": 0}}), "x has a WordPiece model, which is not supported"),
        (changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "x has the decoder WordPiece"),
        (changed(decoder=None), "x has no decoder"),
        (changed(model={"type": "BPE"}), r"not a tokenizer in Hugging Face's format \(KeyError: 'vocab'\)"),
        (changed(pre_tokenizer={"type": "Unheard"}), "not a tokenizer in Hugging Face's format"),
        ({}, "KeyError: 'model'"),
        (changed(added_tokens=[{"id": 1 << 40, "content": "<a>"}]), r"ValueError: the token id 1099511627776"),
        (changed(model={"type": "BPE", "vocab": {"a": "x"}, "merges": []}), "the token id 'x'"),
        # The package ends the process for "éa" cut after the length of "x".
        (changed(model={"type": "BPE", "continuing_subword_prefix": "x"}), "x has continuing_subword_prefix"),
        (changed(model={"type": "BPE", "end_of_word_suffix": "</w>"}), "x has end_of_word_suffix"),
    ],
)
def test_what_cannot_be_used_is_named(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TokenizerJsonModel(spec, name="x")


@pytest.mark.parametrize(
    ("content", "says"), [(b"{", "cannot be read"), (b"[]", "is not a JSON object"), (b"\xff", "cannot be read")]
)
def test_a_damaged_file(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        open_tokenizer_json(tmp_path / "tokenizer.json")


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        model_of("llama3").encode("half \ud83d of a pair")
