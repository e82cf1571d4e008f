"""Where a checkpoint may have its chat templates, and which of several counts; the reference is transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.text.chat.template_files import TOOL_USE, read_template_files
from workers.errors import CheckpointError, ConfigError

LIST = [{"name": "default", "template": "D"}, {"name": TOOL_USE, "template": "T"}]
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "u"}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "nothing": ({}, {}),
    "a text": ({"tokenizer_config.json": {"chat_template": "C"}}, {"default": "C"}),
    "a list": ({"tokenizer_config.json": {"chat_template": LIST}}, {"default": "D", TOOL_USE: "T"}),
    "a file": ({"chat_template.jinja": "J"}, {"default": "J"}),
    "a file wins": ({"chat_template.jinja": "J", "tokenizer_config.json": {"chat_template": "C"}}, {"default": "J"}),
    "several files": (
        {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T", "additional_chat_templates/rag.jinja": "R"},
        {"default": "J", TOOL_USE: "T", "rag": "R"},
    ),
    "files win over a list": (
        {"tokenizer_config.json": {"chat_template": LIST}, "chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "U"},
        {"default": "J", TOOL_USE: "U"},
    ),
    "line ends stay": ({"chat_template.jinja": "J\n"}, {"default": "J\n"}),
}  # fmt: skip


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vocabulary")
    model = Tokenizer(WordLevel({"u": 0, "a": 1}, unk_token="u"))
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="u").save_pretrained(folder)
    return (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder(tmp_path: Path, vocabulary: str, name: str) -> None:
    files, expected = FOLDERS[name]
    config = CONFIG | files.get("tokenizer_config.json", {})
    write(tmp_path, {**files, "tokenizer_config.json": config, "tokenizer.json": vocabulary})
    assert read_template_files(tmp_path).templates == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert (theirs if isinstance(theirs, dict) else {} if theirs is None else {"default": theirs}) == expected


def test_the_file_of_a_processor_is_the_last_choice(tmp_path: Path) -> None:
    """Mistral Small 3.1 has its template there. transformers reads it with the processor only."""
    write(tmp_path, {"chat_template.json": {"chat_template": "P"}})
    assert read_template_files(tmp_path).templates == {"default": "P"}
    write(tmp_path, {"tokenizer_config.json": {"chat_template": "C"}})
    assert read_template_files(tmp_path).templates == {"default": "C"}


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=f"The chat template {tmp_path}/chat_template.jinja cannot be read"):
        read_template_files(tmp_path)


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (None, {}),
        ("G", {"default": "G"}),
        (LIST, {"default": "D", TOOL_USE: "T"}),
        ([{"name": TOOL_USE, "template": "T"}], {TOOL_USE: "T"}),
    ],
)
@pytest.mark.parametrize("given", ["the file", "its folder"])
def test_a_gguf_file(tmp_path: Path, templates: Any, expected: dict[str, str], given: str) -> None:
    """As the package's own writer stores them: a list becomes tokenizer.chat_template.NAME."""
    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    if templates is not None:
        writer.add_chat_template(templates)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_template_files(file if given == "the file" else tmp_path).templates == expected


def test_a_damaged_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf .*is not a GGUF file"):
        read_template_files(tmp_path / "tiny.gguf")
