"""`tramontane plan --finetune`, offline: its table, JSON, and options that cannot work."""

import json

import pytest

from cluster.cli.main import main

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"


@pytest.fixture(autouse=True)
def _no_catalog(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)


def test_fine_tuning(capsys):
    assert main(["plan", MISTRAL, "--finetune", "--gpu", "A10G"]) == 0
    out = capsys.readouterr().out
    assert "LoRA of rank 16" in out and "41.9 M parameters" in out
    assert (
        f"python examples/finetune/finetune.py {MISTRAL} DATA --output OUT --batch-size 4 --max-length 1024 --rank 16"
        in out
    )
    assert main(["plan", MISTRAL, "--finetune", "--quantization", "int4", "--rank", "64", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["training"] == {"rank": 64, "batch_size": 4, "max_length": 1024}
    assert {plan["quantization"] for plan in data["plans"]} == {"int4"}
    assert data["plans"][0]["command"].endswith("--rank 64 --quantize int4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--finetune", "--concurrency", "3"], "--concurrency has no effect with --finetune"),
        (["--rank", "8"], "--rank has no effect without --finetune"),
        (["--finetune", "--quantization", "fp8"], "int8 or int4"),
        (["--finetune", "--gpu", "A10G", "--batch-size", "64"], "does not fit on one A10G"),
    ],
)
def test_options_of_fine_tuning_that_cannot_work(words, message, capsys):
    assert main(["plan", MISTRAL, *words]) == 2
    assert message in capsys.readouterr().err
