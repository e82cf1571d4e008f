"""The recipe of examples/finetune on the demo model: it learns, goes on after an interruption, and its result serves."""

import json
import runpy
import sys

import pytest
import torch
from support.paths import DEMO_MODEL, ROOT

pytest.importorskip("peft")

SCRIPT = ROOT / "examples" / "finetune" / "finetune.py"
OPTIONS = ("--batch-size", "4", "--accumulate", "1", "--lr", "0.005", "--rank", "4", "--save-every", "4")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"color {c}"}, {"role": "assistant", "content": f"{c.upper()}!"}]}
        for c in ("red", "blue", "green", "gold")
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(DEMO_MODEL), *map(str, arguments)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


def adapter(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def test_it_learns_and_goes_on_where_it_stopped(data, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, data, "--output", whole, "--steps", "8", *OPTIONS)
    losses = adapter(whole)["losses"]
    assert losses[-1] < losses[0] - 1
    assert (whole / "loss.png").stat().st_size > 1000
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (config["r"], config["task_type"]) == (4, "CAUSAL_LM")

    class Crash(Exception):
        pass

    def crash_after(model, state, folder):
        save(model, state, folder)
        raise Crash

    module = runpy.run_path(str(SCRIPT), run_name="recipe")
    save = module["save"]
    module["main"].__globals__["save"] = crash_after
    monkeypatch.setattr(
        sys, "argv", ["finetune.py", str(DEMO_MODEL), str(data), "--output", str(parts), "--steps", "8", *OPTIONS]
    )
    with pytest.raises(Crash):
        module["main"]()
    assert len(adapter(parts)["losses"]) == 4
    run(monkeypatch, data, "--output", parts, "--steps", "8", *OPTIONS)
    assert "Going on from step 4." in capsys.readouterr().out
    assert adapter(parts)["losses"] == pytest.approx(losses, rel=1e-4)


def test_the_merged_checkpoint_is_the_base_with_the_adapter(data, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from workers.checkpoint.model_config import load_model_config
    from workers.config import EngineConfig
    from workers.engine.llm_engine import LLMEngine
    from workers.protocol import GenerateRequest, SamplingParams

    out, merged = tmp_path / "out", tmp_path / "merged"
    run(monkeypatch, data, "--output", out, "--steps", "4", *OPTIONS)
    run(monkeypatch, data, "--output", out, "--merge", merged)
    assert (merged / "tokenizer.model.v3").exists()
    ids = [1, 300, 301, 302, 303]
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    engine = LLMEngine(EngineConfig(model_path=str(merged), model=load_model_config(str(merged)), max_num_seqs=1))
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=0)
    request = GenerateRequest(request_id="0", prompt_token_ids=ids, sampling=sampling)
    found = [v for delta in engine.stream(request) for v in delta.prompt_logprobs or []]
    for i, value in enumerate(found[1:], 1):
        # The merged weights are rounded to the checkpoint's bfloat16.
        assert value.logprob == pytest.approx(expected[i - 1, ids[i]].item(), abs=0.05)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1 is not a conversation"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message of role"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(tmp_path, monkeypatch, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, path, "--output", tmp_path / "out")
