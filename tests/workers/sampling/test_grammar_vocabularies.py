"""Grammars over every kind of vocabulary: masks hold exactly the tokens whose bytes fit, and an engine's outputs follow."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from support.checkpoints.gguf_files import write_gguf
from support.checkpoints.tiny import make_tiny_model, write_tiny_checkpoint
from support.fakes.engines import make_engine
from support.vocabularies.gguf_vocabulary import byte_level_metadata
from support.vocabularies.tekken import write_tekken
from support.vocabularies.tokenizers import SPECIAL, write_tokenizer

from workers.protocol import FinishReason, GenerateRequest, SamplingParams, TokenDelta
from workers.sampling.vocabulary import load_grammar_tokenizer
from workers.tokenizer_files.opening import open_model
from workers.tokenizer_files.pieces import PieceTable

NAMES = ["llama3", "smollm2", "metaspace", "tekken", "gguf"]
FREE = '%llguidance {"no_forcing": true}\n'
PARROTS = FREE + "start: /(🦜|é|[a-c ]){3,6}/"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 9},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "é", "日本"]}, "minItems": 1, "maxItems": 3},
        "count": {"type": "integer", "minimum": 10, "maximum": 99},
    },
    "required": ["name", "tags", "count"],
    "additionalProperties": False,
}


def write(folder: Path, name: str) -> Path:
    """The tokenizer's file."""
    if name == "tekken":
        return write_tekken(folder, "v3") / "tekken.json"
    if name == "gguf":
        model = make_tiny_model(sliding_window=None)
        return write_gguf(folder / "x.gguf", model, dtype="F32", metadata=byte_level_metadata("llama-bpe"))
    return write_tokenizer(folder, name) / "tokenizer.json"


@pytest.fixture(scope="module", params=NAMES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def pieces(path: Path) -> PieceTable:
    model = open_model(path)
    return model.pieces.with_added(model.added_tokens)


@pytest.fixture(scope="module")
def eos(path: Path, pieces: PieceTable) -> int:
    return next(i for i, name in enumerate(pieces.names) if name in ("</s>", "<|eot_id|>", "<|im_end|>"))


@pytest.fixture(scope="module")
def tokenizer(path: Path, pieces: PieceTable, eos: int) -> LLTokenizer:
    return load_grammar_tokenizer(path, vocab_size=len(pieces.names) + 8, eos_token_ids=[eos])


def allowed(tokenizer: LLTokenizer, grammar: str, tokens: list[int] | None = None) -> set[int]:
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert matcher.consume_tokens(tokens or []), matcher.get_error()
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    assert not matcher.is_error(), matcher.get_error()
    return {i for i in range(tokenizer.vocab_size) if mask >> i & 1}


def adds(pieces: PieceTable, token_id: int) -> bytes:
    """What a grammar sees of a token: nothing of a control token, nor of a second way to write a space."""
    part = pieces.partial[token_id]
    return b"" if part == b" " and not pieces.byte_level else pieces.bytes_of(token_id)


def test_a_token_is_allowed_where_its_bytes_are(tokenizer: LLTokenizer, pieces: PieceTable, eos: int) -> None:
    fits = re.compile(rb"[ a-f]+")
    expected = {i for i in range(len(pieces.names)) if fits.fullmatch(adds(pieces, i))}
    assert allowed(tokenizer, FREE + r"start: /[ a-f]*/") == expected | {eos}
    assert len(expected) > 7


def test_any_text_but_no_control_token(tokenizer: LLTokenizer, pieces: PieceTable, eos: int) -> None:
    mask = allowed(tokenizer, FREE + r"start: /(.|\n)*/")
    control = {i for i, is_control in enumerate(pieces.is_control) if is_control}
    assert mask & control == {eos}
    assert mask.isdisjoint(range(len(pieces.names), len(pieces.names) + 8)), "ids that the tokenizer lacks"
    # What cannot begin a character cannot begin a text.
    begin = {
        i
        for i in range(len(pieces.names))
        if (first := adds(pieces, i)[:1]) and not 0x80 <= first[0] < 0xC2 and first[0] < 0xF5
    }
    assert mask - {eos} <= begin
    assert len(mask) > 0.9 * len(begin)


@pytest.mark.parametrize("text", ["🦜", "é", "日本"])
def test_a_character_in_parts(tokenizer: LLTokenizer, pieces: PieceTable, eos: int, text: str) -> None:
    byte = {pieces.bytes_of(i): i for i in range(len(pieces.names)) if len(pieces.bytes_of(i)) == 1}
    ids = [byte[bytes((b,))] for b in text.encode()]
    for i, token_id in enumerate(ids):
        assert token_id in allowed(tokenizer, f'{FREE}start: "{text}"', ids[:i])
    assert allowed(tokenizer, f'start: "{text}"', ids) == {eos}


@pytest.mark.parametrize("text", ["the quick", " dog", "  two", "é🦜", 'a "b"', "中文", ""])
def test_forced_text_is_written_as_the_model_would(path: Path, tokenizer: LLTokenizer, text: str) -> None:
    model = open_model(path)
    written = tokenizer.tokenize_str(text)
    assert tokenizer.decode_bytes(written).decode() == text
    assert written == model.encode_continuation(text)


def test_control_tokens_by_name_and_by_id(tokenizer: LLTokenizer, pieces: PieceTable) -> None:
    name = next(n for n in ("[TOOL_CALLS]", *SPECIAL["llama3"], *SPECIAL["smollm2"], "<s>") if n in pieces.names)
    token_id = pieces.names.index(name)
    written = f"<{name[1:-1]}>" if name.startswith("[") else name
    for grammar in (f'start: {written} "a"', f'start: <[{token_id}]> "a"'):
        assert allowed(tokenizer, grammar) == {token_id}


def run(folder: Path, path: Path, requests: list[GenerateRequest]) -> dict[str, list[TokenDelta]]:
    core = make_engine(folder, tokenizer_path=str(path), num_kv_blocks=1000, max_model_len=1024).core
    for request in requests:
        core.add_request(request)
    found: dict[str, list[TokenDelta]] = {}
    while core.has_work():
        for delta in core.step():
            found.setdefault(delta.request_id, []).append(delta)
    return found


def test_an_engines_outputs_follow(path: Path, pieces: PieceTable, eos: int, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, vocab_size=len(pieces.names), eos_token_id=eos)
    schema = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_pattern": r" |\n {0,4}"})

    def constrained(name: str, grammar: str, seed: int) -> GenerateRequest:
        sampling = SamplingParams(max_tokens=300, seed=seed, grammar=grammar, temperature=2.0)
        return GenerateRequest(request_id=name, prompt_token_ids=[1, 5], sampling=sampling)

    found = run(
        folder,
        path,
        [constrained(f"{kind}{i}", grammar, i) for i in range(4) for kind, grammar in (("p", PARROTS), ("s", schema))],
    )
    texts = set()
    for name, deltas in found.items():
        assert deltas[-1].finish_reason is FinishReason.STOP, name
        ids = [t for delta in deltas for t in delta.token_ids if t != delta.stop_token_id]
        text = b"".join(pieces.bytes_of(i) for i in ids).decode()
        texts.add(text)
        if name.startswith("p"):
            assert re.fullmatch(r"(🦜|é|[a-c ]){3,6}", text)
        else:
            value: dict[str, Any] = json.loads(text)
            jsonschema.validate(value, SCHEMA)
    assert len(texts) > 4
