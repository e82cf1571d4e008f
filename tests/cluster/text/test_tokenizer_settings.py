"""What a checkpoint's files say about its tokens, with the rules of transformers."""

import json
from pathlib import Path

import pytest

from cluster.text.tokenizer_settings import TokenizerSettings, read_tokenizer_settings
from workers.errors import ConfigError


@pytest.mark.parametrize(
    ("files", "scheme"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"legacy": True}}, "always"),
        ({"tokenizer_config.json": {"legacy": False}}, "first"),
        ({"tokenizer_config.json": {"legacy": None}}, "always"),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, "always"),
        ({"tokenizer_config.json": {"add_prefix_space": False}}, "never"),
        ({"tokenizer.json": {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}}, "first"),
        (
            {
                "tokenizer_config.json": {"legacy": False},
                "tokenizer.json": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}]}},
            },
            "always",
        ),
        ({"tokenizer_config.json": {"legacy": False}, "tokenizer.json": {"normalizer": None}}, "first"),
    ],
)
def test_which_parts_of_a_text_get_a_leading_space(tmp_path: Path, files: dict[str, dict], scheme: str | None) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_tokenizer_settings(tmp_path).prepend_scheme == scheme


@pytest.mark.parametrize(
    ("files", "special"),
    [
        ({"added_tokens.json": {"<a>": 9}}, False),
        ({"added_tokens.json": {"<a>": 9}, "special_tokens_map.json": {"additional_special_tokens": ["<a>"]}}, True),
        ({"added_tokens.json": {"<a>": 9}, "tokenizer_config.json": {"eos_token": {"content": "<a>"}}}, True),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<a>"}}}}, False),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<a>", "special": True}}}}, True),
        (
            {
                "tokenizer_config.json": {
                    "added_tokens_decoder": {"9": {"content": "<a>"}},
                    "extra_special_tokens": {"image_token": "<a>"},
                }
            },
            True,
        ),
        ({"tokenizer.json": {"added_tokens": [{"id": 9, "content": "<a>", "special": True}]}}, True),
        (
            {
                "tokenizer.json": {"added_tokens": [{"id": 9, "content": "<a>", "special": True}]},
                "tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<a>", "special": False}}},
            },
            False,
        ),
    ],
)
def test_which_added_tokens_are_special(tmp_path: Path, files: dict[str, dict], special: bool) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    token = read_tokenizer_settings(tmp_path).added_tokens["<a>"]
    assert (token.id, token.special) == (9, special)


def test_what_is_no_added_token_is_left_out(tmp_path: Path) -> None:
    listed = ["<b>", None, {"content": "<a>", "id": 9, "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}))
    assert list(read_tokenizer_settings(tmp_path).added_tokens) == ["<a>"]


def test_a_folder_without_files_has_the_defaults(tmp_path: Path) -> None:
    assert read_tokenizer_settings(tmp_path) == TokenizerSettings()


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "added_tokens.json").write_text(content)
    with pytest.raises(ConfigError, match=r"added_tokens\.json") as error:
        read_tokenizer_settings(tmp_path)
    assert error.value.remedy
