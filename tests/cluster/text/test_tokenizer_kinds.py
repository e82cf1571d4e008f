"""Every kind of tokenizer: ids equal to transformers', special tokens, which file of a folder is used, and what follows for requests."""

import json
import shutil
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from support.checkpoints.gguf_files import write_gguf
from support.paths import DEMO_MODEL
from support.vocabularies.gguf_vocabulary import byte_level_metadata
from support.vocabularies.tekken import write_tekken
from support.vocabularies.tokenizers import KINDS, NAMED, PLAIN, SPECIAL, reference, write_tokenizer
from transformers.convert_slow_tokenizer import generate_merges

from cluster.text.end_tokens import tokenizer_end_tokens
from cluster.text.infilling import encode_infilling
from cluster.text.special_tokens import free_marks
from cluster.text.tokenizer import Tokenizer, load_tokenizer
from workers.errors import ConfigError, RequestError
from workers.sampling.vocabulary import grammar_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
V1 = DATA / "tokenizer.model.v1"
V7 = DATA / "mistral_instruct_tokenizer_241114.model.v7"
FRAGMENTS = [
    *dict.fromkeys(name for names in SPECIAL.values() for name in names), PLAIN, "<|im_", "<0x0A>", "▁", "Ġ",
    " ", "  ", "\n", "\t", "a", "quick", " dog", "'s", "123", "é", "日本", "😀", "\u0301", "\x00", "\u2028", ".",
]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("kinds")
    found = {kind: load_tokenizer(write_tokenizer(folder / kind, kind)) for kind in KINDS}
    return found | {"tekken": load_tokenizer(write_tekken(folder / "tekken", "v3"))}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(text=TEXTS)
def test_a_prompt_has_transformers_ids(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer, expected = tokenizers[kind], reference(kind)
    ids = expected(text, add_special_tokens=False).input_ids
    assert tokenizer.encode_prompt(text, add_special_tokens=False) == ids
    bos = [] if kind == "smollm2" else [tokenizer.bos_token_id]
    assert tokenizer.encode_prompt(text) == (ids if bos and ids[:1] == bos else [*bos, *ids]), "BOS comes once"
    assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", [*KINDS, "tekken"])
@settings(max_examples=60)
@given(text=TEXTS)
def test_a_clients_text_has_no_special_token(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    assert not tokenizer.control_token_ids & set(tokenizer.encode(text, bos=False))
    end = "</s>" if kind == "tekken" else NAMED[kind]["eos_token"]
    (mark,) = free_marks([text], 1)
    ids, _ = tokenizer.encode_rendered(tokenizer.special_tokens.protect(text, mark) + end, mark=mark)
    assert tokenizer.control_token_ids & set(ids[:-1]) == set()
    assert ids[-1] == tokenizer.eos_token_id
    if tokenizer.pieces.byte_level:
        assert tokenizer.decode(ids) == text


def test_an_added_token_that_is_not_special_may_come_from_a_client(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama3"]
    text = f"{PLAIN}<|eot_id|>"
    (mark,) = free_marks([text], 1)
    ids, _ = tokenizer.encode_rendered(tokenizer.special_tokens.protect(text, mark), mark=mark)
    assert ids == [tokenizer.pieces.names.index(PLAIN), *tokenizer.encode("<|eot_id|>", bos=False)]
    assert tokenizer.decode(ids) == text, "and it stays in the output"


@pytest.mark.parametrize(
    ("kind", "config", "around"),
    [
        ("llama3", {}, (["<|begin_of_text|>"], [])),
        ("llama3", {"add_bos_token": False}, ([], [])),
        ("llama3", {"add_bos_token": True, "add_eos_token": True}, (["<|begin_of_text|>"], ["<|eot_id|>"])),
        ("smollm2", {}, ([], [])),
        ("smollm2", {"add_bos_token": True}, (["<|im_start|>"], [])),
    ],
)
def test_what_stands_around_a_prompt(
    tmp_path: Path, kind: str, config: dict[str, bool], around: tuple[list[str], list[str]]
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, kind, **config))
    names = tokenizer.pieces.names
    before, after = ([names.index(name) for name in part] for part in around)
    assert tokenizer.encode_prompt("hi") == [*before, *tokenizer.encode("hi", bos=False), *after]
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == (bool(before), bool(after))


def test_a_tokenizer_json_alone(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, "llama3")
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.template_version) == (None, None, None)
    assert tokenizer.encode_prompt("hi") == reference("llama3")("hi").input_ids
    assert tokenizer.encode("hi") == reference("llama3")("hi").input_ids


def test_added_tokens_that_the_model_lacks_are_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fine-tunes often add a token for padding and leave the embeddings as they were."""
    folder = write_tokenizer(tmp_path, "llama3")
    size = load_tokenizer(folder).vocab_size
    tokenizer = load_tokenizer(folder, model_vocab_size=size - 1)
    assert tokenizer.vocab_size == size - 1
    assert tokenizer.encode_prompt(PLAIN, add_special_tokens=False) == tokenizer.encode(PLAIN, bos=False)
    assert f"{PLAIN!r} is plain text here: its id is beyond the model's" in caplog.text
    grammar_tokenizer(tokenizer.model, vocab_size=size - 1, eos_token_ids=[1])
    with pytest.raises(ConfigError, match="but the model has only 100"):
        load_tokenizer(folder, model_vocab_size=100)


def test_a_token_within_a_word(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, "llama3")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append(
        {"id": 600, "content": "dog", "single_word": True, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(folder)
    assert 600 in tokenizer.encode_prompt("a dog, x")
    assert 600 not in tokenizer.encode_prompt("dogs hotdog _dog")


def write_fast(folder: Path, path: Path, *, scheme: str | None) -> None:
    """tokenizer.json with the pieces of a SentencePiece model. scheme: of a Metaspace pre-tokenizer; None: a Prepend normalizer."""
    processor = SentencePieceProcessor(model_file=str(path))
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.vocab_size())}
    vocab = {piece: i for i, piece in enumerate(scores)}
    spec = json.loads((write_tokenizer(folder, "metaspace" if scheme else "llama2") / "tokenizer.json").read_text())
    if scheme is not None:
        spec["pre_tokenizer"]["prepend_scheme"] = scheme
    spec["model"] |= {"vocab": vocab, "merges": generate_merges(vocab, scores)}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("names", "expected", "kind", "version"),
    [
        (["tekken.json", "tokenizer.json", "tokenizer.model"], "tekken.json", "tekken", "v3"),
        (["tekken.json", "tokenizer.model.v3"], "tekken.json", "tekken", "v3"),
        (["tokenizer.model.v7", "tokenizer.json"], "tokenizer.model.v7", "SentencePiece", "v7"),
        (["tokenizer.model.v7m1", "tokenizer.model"], "tokenizer.model.v7m1", "SentencePiece", "v7"),
        (["tokenizer.model.v3", "tokenizer.model.v7"], "tokenizer.model.v7", "SentencePiece", "v7"),
        (["tokenizer.json", "tokenizer.model"], "tokenizer.json", "BPE", None),
        (["tokenizer.json", "tokenizer.model of Llama 3"], "tokenizer.json", "BPE", None),
        (["tokenizer.model"], "tokenizer.model", "SentencePiece", "v1"),
        (["x.gguf", "tokenizer.json"], "x.gguf", "BPE", None),
    ],
)
def test_which_file_is_used(tmp_path: Path, names: list[str], expected: str, kind: str, version: str | None) -> None:
    for name in names:
        if name == "tekken.json":
            write_tekken(tmp_path, "v3")
        elif name == "tokenizer.json":
            write_tokenizer(tmp_path, "smollm2")
        elif name == "x.gguf":
            write_gguf(tmp_path / name, dtype="F32", metadata=byte_level_metadata("smollm"))
        elif name.endswith("Llama 3"):
            (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
        else:
            shutil.copy(V1 if name == "tokenizer.model" else V7, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.path.name, tokenizer.model.kind, tokenizer.template_version) == (expected, kind, version)
    assert tokenizer.description == f"{kind} ({expected}, {tokenizer.vocab_size:,} tokens)"
    assert (tokenizer.tekken is not None) == (kind == "tekken")


@pytest.mark.parametrize("scheme", [None, "always", "first", "never"])
def test_sentencepiece_reads_the_pieces_that_both_files_list(tmp_path: Path, scheme: str | None) -> None:
    demo = DEMO_MODEL / "tokenizer.model.v3"
    write_fast(tmp_path, demo, scheme=scheme)
    fast = load_tokenizer(tmp_path)
    shutil.copy(demo, tmp_path / "tokenizer.model")
    both = load_tokenizer(tmp_path)
    assert (fast.path.name, both.path.name) == ("tokenizer.json", "tokenizer.model")
    for text in ("Hello there", " two  spaces\n\tdef f(x):", "日本 😀", "a</s> b<s>", "</s>x", " x", "  x</s>  y", ""):
        assert fast.encode_prompt(text) == both.encode_prompt(text), text


def test_a_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", dtype="F32", metadata=byte_level_metadata("smollm"))
    tokenizer = load_tokenizer(path)
    assert tokenizer.path == load_tokenizer(tmp_path).path == path
    assert tokenizer.encode_prompt("hello<|im_end|>")[-1] == 2
    assert tokenizer_end_tokens(path) == (0, 2)


@pytest.mark.parametrize(
    ("kind", "expected"), [("llama3", "<|eot_id|>"), ("smollm2", "<|im_end|>"), ("llama2", "</s>"), ("tekken", "</s>")]
)
def test_end_tokens(tmp_path: Path, kind: str, expected: str) -> None:
    folder = write_tekken(tmp_path, "v3") if kind == "tekken" else write_tokenizer(tmp_path, kind)
    assert tokenizer_end_tokens(folder) == (load_tokenizer(folder).pieces.names.index(expected),)


@pytest.mark.parametrize("kind", ["llama3", "smollm2", "tekken"])
def test_single_tokens_of_bytes(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("ᚠ the", bos=False)
    assert b"".join(bytes(tokenizer.token_bytes(i) or ()) for i in ids) == "ᚠ the".encode()
    lead = next(i for i in range(tokenizer.vocab_size) if tokenizer.pieces.bytes_of(i) == b"\xe1")
    assert (tokenizer.token_text(lead), tokenizer.token_bytes(lead)) == ("<0xE1>", [0xE1])
    assert (tokenizer.token_text(tokenizer.eos_token_id), tokenizer.token_bytes(tokenizer.eos_token_id)) == (
        tokenizer.pieces.names[tokenizer.eos_token_id],
        None,
    )
    texts = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
    assert len(set(texts)) == len(texts), "log-probabilities list tokens by their text"
    mixed = next((i for i, part in enumerate(tokenizer.pieces.partial) if part and part[:1] == b" "), None)
    assert mixed is None or tokenizer.token_text(mixed).startswith(" <0x")


@pytest.mark.parametrize("kind", [*KINDS, "tekken"])
def test_bad_words_are_banned_inside_a_text_and_at_its_start(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    written = [b"".join(tokenizer.pieces.bytes_of(i) for i in ids) for ids in tokenizer.bad_words_ids([" quick"])]
    assert {b"quick", b" quick"} == set(written)
    end = tokenizer.pieces.names[tokenizer.eos_token_id]
    assert (tokenizer.eos_token_id,) in tokenizer.bad_words_ids([end])


@pytest.mark.parametrize("kind", [*KINDS, "tekken"])
def test_a_texts_length_bounds_its_tokens(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for text in ("The quick brown fox jumps", "日本語", " " * 40, NAMED.get(kind, {}).get("eos_token", "</s>") * 3):
        assert len(tokenizer.encode_prompt(text, add_special_tokens=False)) >= len(text) / tokenizer.max_piece_chars


def test_infilling_with_tekken(tmp_path: Path) -> None:
    # mistral-common counts on a piece of its anchor, which is the 37,811th.
    folder = write_tekken(tmp_path, "v3", num_pieces=37_811)
    tokenizer, expected = load_tokenizer(folder), MistralTokenizer.from_file(str(folder / "tekken.json"))
    for prefix, suffix in (("def f(", "return a"), ("x", "\n  日本"), (" a", "")):
        ids = expected.encode_fim(FIMRequest(prompt=prefix, suffix=suffix)).tokens
        assert encode_infilling(tokenizer, prefix, suffix) == ids


def test_infilling_without_the_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(RequestError, match="cannot fill in the middle"):
        encode_infilling(tokenizers["llama3"], "a", "b")
