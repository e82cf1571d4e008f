"""`load_tokenizer`: which file and template version it chooses, and what it rejects."""

import shutil
from pathlib import Path

import mistral_common
import pytest
from support.paths import DEMO_MODEL

from cluster.text.tokenizer import load_tokenizer
from workers.errors import ConfigError, RequestError

DATA = Path(mistral_common.__file__).parent / "data"
V1 = DATA / "tokenizer.model.v1"
V2 = DATA / "mistral_instruct_tokenizer_240216.model.v2"
V3 = DATA / "mistral_instruct_tokenizer_240323.model.v3"
DEMO = DEMO_MODEL / "tokenizer.model.v3"


@pytest.mark.parametrize(
    ("source", "name", "option", "version"),
    [
        (V1, "tokenizer.model.v1", None, "v1"),
        (V2, "tokenizer.model.v2", None, "v2"),
        (V3, "tokenizer.model.v3", None, "v3"),
        (V1, "tokenizer.model", None, "v1"),  # v0.1 and v0.2: 32,000 pieces
        (V3, "tokenizer.model", None, "v3"),  # v0.3: 32,768
        (DEMO, "tokenizer.model.v3", None, "v3"),
        (V3, "tokenizer.model", "v2", "v2"),
        (V3, "tokenizer.model.v3", "v1", "v1"),
    ],
)
def test_the_template_version(tmp_path: Path, source: Path, name: str, option, version: str) -> None:
    shutil.copy(source, tmp_path / name)
    assert load_tokenizer(tmp_path, version=option).template_version == version


def test_the_newest_version_in_a_folder_is_used(tmp_path: Path) -> None:
    shutil.copy(V1, tmp_path / "tokenizer.model")
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model.v3"


@pytest.mark.parametrize(
    ("files", "option", "says"),
    [
        ({}, None, "has no tokenizer"),
        ({"tekken.json": V3}, None, r"tekken.json is not a tekken tokenizer \(UnicodeDecodeError: .*Download it again"),
        ({"vocab.json": V3, "merges.txt": V3}, None, "has its tokenizer in vocab.json and merges.txt"),
        ({"tokenizer.model": V3}, "v8", "'v8' is not known. Use one of v1, v2, v3, v7"),
    ],
)
def test_refusals(tmp_path: Path, files: dict[str, Path], option, says: str) -> None:
    for name, source in files.items():
        shutil.copy(source, tmp_path / name)
    with pytest.raises(ConfigError, match=says):
        load_tokenizer(tmp_path, version=option)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf at all")
    with pytest.raises(ConfigError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_piece_that_is_not_text_is_named(tmp_path: Path) -> None:
    data = DEMO.read_bytes()
    at = data.index("▁the".encode())
    (tmp_path / "tokenizer.model").write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(ConfigError, match=r"tokenizer\.model has a piece that is not valid text\. Download it again"):
        load_tokenizer(tmp_path)


def test_more_tokens_than_the_model_names_both_numbers(tmp_path: Path) -> None:
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    with pytest.raises(ConfigError, match=r"32768.*32000"):
        load_tokenizer(tmp_path, model_vocab_size=32_000)
    assert load_tokenizer(tmp_path, model_vocab_size=40_000).vocab_size == 32_768


def test_encode_and_decode() -> None:
    tokenizer = load_tokenizer(DEMO.parent)
    ids = tokenizer.encode("def fibonacci(n):")
    assert ids[0] == tokenizer.bos_token_id == 1
    assert ids[1:] == tokenizer.encode("def fibonacci(n):", bos=False)
    assert tokenizer.decode([*ids, 99_999]) == "def fibonacci(n):"
    assert tokenizer.encode("") == [1]
    assert 3 in tokenizer.control_token_ids
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("half \ud83d of a pair")


def test_single_tokens_as_text_and_bytes() -> None:
    tokenizer = load_tokenizer(DEMO.parent)
    high, low = tokenizer.pieces.partial.index(b"\xe2"), tokenizer.pieces.partial.index(b"A")
    assert (tokenizer.token_text(2), tokenizer.token_bytes(2)) == ("</s>", None)
    assert (tokenizer.token_text(high), tokenizer.token_bytes(high)) == ("<0xE2>", [0xE2])
    assert (tokenizer.token_text(low), tokenizer.token_bytes(low)) == ("A", [0x41])
    word = tokenizer.pieces.names.index("▁the")
    assert (tokenizer.token_text(word), tokenizer.token_bytes(word)) == (" the", list(b" the"))
    assert tokenizer.token_bytes(99_999) is None
