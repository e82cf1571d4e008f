"""The vocabulary under a grammar: every mask holds exactly the tokens whose bytes the grammar allows."""

from importlib.resources import files
from pathlib import Path

import pytest
from llguidance import LLMatcher
from sentencepiece import SentencePieceProcessor

from workers.errors import ConfigError
from workers.sampling.vocabulary import load_grammar_tokenizer

DATA = Path(str(files("mistral_common"))) / "data"
TOKENIZERS = {
    "demo": Path("examples/demo_model/tokenizer.model.v3"),
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}
FREE = (
    '%llguidance {"no_forcing": true}\n'  # else llguidance picks the one way a model would write a text without choice
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def vocabulary(request):
    sp = SentencePieceProcessor(model_file=str(TOKENIZERS[request.param]))
    size = sp.vocab_size()
    tokenizer = load_grammar_tokenizer(TOKENIZERS[request.param], vocab_size=size + 8, eos_token_ids=[2, size - 1])
    return sp, tokenizer


def allowed(tokenizer, grammar: str, tokens: list[int] | None = None) -> set[int]:
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert matcher.consume_tokens(tokens or []), matcher.get_error()
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    assert not matcher.is_error(), matcher.get_error()
    return {i for i in range(tokenizer.vocab_size) if mask >> i & 1}


def test_a_text_token_is_allowed_where_what_it_adds_to_a_text_is(vocabulary):
    sp, tokenizer = vocabulary
    base = len(sp.decode(sp.encode("x")))
    plain = [i for i in range(sp.vocab_size() - 1) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    surfaces = {i: sp.decode([*sp.encode("x"), i])[base:] for i in plain}
    mask = allowed(tokenizer, FREE + r"start: /[ a-f]*/")
    expected = {i for i, text in surfaces.items() if text and set(text) <= set(" abcdef")}
    assert {i for i in mask if i in surfaces} == expected
    bytes_ = {sp.piece_to_id(f"<0x{ord(c):02X}>") for c in "abcdef"}
    assert mask - expected == bytes_ | {2, sp.vocab_size() - 1}, "the rest: bytes, and both ends of text"


def test_never_allowed(vocabulary):
    sp, tokenizer = vocabulary
    size = sp.vocab_size()
    mask = allowed(tokenizer, FREE + r"start: /(.|\n)*/")
    assert sp.piece_to_id("<0x20>") not in mask
    assert mask.isdisjoint(range(size, size + 8)), "ids that the tokenizer lacks"
    assert {i for i in mask if i < size and (sp.is_control(i) or sp.is_unknown(i))} == {2}
    assert len(mask) > size * 0.95


def test_a_character_of_several_bytes(vocabulary):
    sp, tokenizer = vocabulary
    byte = {value: sp.piece_to_id(f"<0x{value:02X}>") for value in "🦜".encode()}
    ids = list(byte.values())
    for i, token_id in enumerate(ids):
        assert token_id in allowed(tokenizer, FREE + 'start: "🦜"', ids[:i])
    assert allowed(tokenizer, 'start: "🦜"', ids) == {2, sp.vocab_size() - 1}


@pytest.mark.parametrize("text", ["hello world", " hello", "  two", "▁", "é🦜", 'a "b"\n\tc', "中文"])
def test_forced_text_is_written_as_the_model_would(vocabulary, text):
    sp, tokenizer = vocabulary
    matcher = LLMatcher(tokenizer, f"start: {TEXT.get(text, repr(text))}", log_level=0)
    written = tokenizer.tokenize_str(text)
    assert tokenizer.decode_bytes(written).decode() == text
    if "▁" not in text:
        assert written == sp.encode("\n" + text)[len(sp.encode("\n")) :]
    assert not matcher.is_error()


TEXT = {
    'a "b"\n\tc': r'"a \"b\"\n\tc"',
    **{t: f'"{t}"' for t in ("hello world", " hello", "  two", "▁", "é🦜", "中文")},
}


@pytest.mark.parametrize(("name", "piece"), [("<TOOL_CALLS>", "[TOOL_CALLS]"), ("</INST>", "[/INST]"), ("<s>", "<s>")])
def test_control_tokens_by_name_and_by_id(name, piece):
    path = TOKENIZERS["demo"]
    tokenizer = load_grammar_tokenizer(path, vocab_size=4096, eos_token_ids=[2])
    token_id = SentencePieceProcessor(model_file=str(path)).piece_to_id(piece)
    for grammar in (f'start: {name} "x"', f'start: <[{token_id}]> "x"'):
        assert allowed(tokenizer, grammar) == {token_id}
        assert allowed(tokenizer, FREE + grammar, [token_id]) >= {tokenizer.tokenize_str("x")[0]}


def test_what_is_no_tokenizer_of_the_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_grammar_tokenizer(tmp_path / "tokenizer.model", vocab_size=10, eos_token_ids=[2])
    with pytest.raises(ConfigError, match="Use the tokenizer that belongs to the model"):
        load_grammar_tokenizer(TOKENIZERS["demo"], vocab_size=4095, eos_token_ids=[2])
