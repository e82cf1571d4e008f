"""Every token that a checkpoint's files say ends an answer does end it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.checkpoint_files import write_checkpoint
from support.fakes.engines import make_request
from support.paths import DEMO_MODEL

from cluster.cli.options.parser import make_parser
from cluster.cli.options.settings import engine_config
from cluster.text.end_tokens import tokenizer_end_tokens
from workers.engine.llm_engine import LLMEngine
from workers.protocol import FinishReason

IM_END = 4001
CHATML: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {str(IM_END): {"content": "<|im_end|>", "special": True}},
    }
}


def write(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2),  # the SentencePiece model's own
        (CHATML, IM_END),
        (
            {
                "tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}},
                "added_tokens.json": {"<|im_end|>": IM_END},
            },
            IM_END,
        ),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, 2),
        ({"tokenizer_config.json": {"eos_token": "[INST]"}}, 3),  # a piece of the SentencePiece model
        ({"tokenizer_config.json": {}}, 2),
        ({"tokenizer_config.json": {"eos_token": None}}, 2),
        ({"tokenizer_config.json": {"eos_token": "unheard of"}}, 2),
        (
            {"special_tokens_map.json": {"eos_token": "<|im_end|>"}, "added_tokens.json": {"<|im_end|>": IM_END}},
            IM_END,
        ),
    ],
)
def test_the_tokenizers_own(tmp_path: Path, files: dict[str, dict[str, Any]], expected: int) -> None:
    assert tokenizer_end_tokens(write(write_checkpoint(tmp_path / "model"), files)) == (expected,)


def settings(folder: Path) -> tuple[int, ...]:
    args = make_parser().parse_args(["serve", str(folder)])
    return engine_config(args, folder, device="cpu")[0].model.eos_token_ids


def test_all_files_count(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", eos_token_id=[2])
    assert settings(folder) == (2,)
    write(folder, {"generation_config.json": {"eos_token_id": [2, 5, 7]}} | CHATML)
    assert settings(folder) == (2, 5, 7, IM_END)


def test_a_token_that_the_model_does_not_have_ends_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    write(folder, {"tokenizer_config.json": {"eos_token": "x", "added_tokens_decoder": {"4096": {"content": "x"}}}})
    assert settings(folder) == (2,)


def test_mistrals_layout_ends_with_2(tmp_path: Path) -> None:
    fields = {
        "dim": 8,
        "n_layers": 1,
        "hidden_dim": 16,
        "n_heads": 2,
        "head_dim": 4,
        "norm_eps": 1e-5,
        "vocab_size": 4096,
    }
    folder = write(tmp_path, {"params.json": fields, "generation_config.json": {"eos_token_id": 7}} | CHATML)
    shutil.copy(DEMO_MODEL / "tokenizer.model.v3", folder)
    assert settings(folder) == (2,)


@pytest.mark.parametrize("token_id", [7, IM_END])
def test_an_answer_ends_after_the_token(tmp_path: Path, token_id: int) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.model.v3"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    write(tmp_path, {"generation_config.json": {"eos_token_id": [2, 7]}} | CHATML)
    args = make_parser().parse_args(["generate", str(tmp_path), "--prompt", "x", "--max-model-len", "64"])
    engine = LLMEngine(engine_config(args, tmp_path, device="cpu")[0])
    request = make_request("r", [1, 5, 6], logit_bias={token_id: 100.0}, ignore_eos=False)
    deltas = list(engine.stream(request))
    assert [i for delta in deltas for i in delta.token_ids] == [token_id]
    assert deltas[-1].finish_reason is FinishReason.STOP
