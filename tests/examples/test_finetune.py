"""The recipe of examples/finetune on the demo model: it learns, goes on after an interruption, and its result serves."""

import json
import runpy
import sys

import pytest
import torch
from support.paths import DEMO_MODEL, ROOT

from cluster.text.chat.template import Message
from cluster.text.load import load_text
from workers.quant.at_load import round_to_groups

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


def test_only_answers_count_for_the_loss(data):
    module = runpy.run_path(str(SCRIPT), run_name="recipe")
    options = {"vocab_size": 32768, "chat_template": "auto", "max_length": 64}
    first = module["read_examples"](data, DEMO_MODEL, **options)[0]
    text = load_text(DEMO_MODEL, chat_template="auto", model_vocab_size=32768)
    ids = text.chat_template.encode([Message("user", "color red")]).token_ids
    shown = [text.tokenizer.token_text(i) for i in ids]
    assert "[INST]" in shown and "[/INST]" in shown
    assert first.ids[: len(ids)] == list(ids)
    assert first.labels[: len(ids)] == [module["IGNORED"]] * len(ids)
    assert first.labels[len(ids) :] == first.ids[len(ids) :] and first.ids[-1] == text.tokenizer.eos_token_id


def test_an_answer_beyond_the_longest_length_is_left_out(data, tmp_path, monkeypatch, capsys):
    long = {"messages": [{"role": "user", "content": "red " * 90}, {"role": "assistant", "content": "RED"}]}
    data.write_text(data.read_text() + "\n" + json.dumps(long))
    run(monkeypatch, data, "--output", tmp_path / "out", "--steps", "1", "--max-length", "40", *OPTIONS)
    assert "1 conversations have no answer within --max-length 40 tokens" in capsys.readouterr().out
    assert adapter(tmp_path / "out")["losses"][0] > 0


@pytest.mark.parametrize("num_bits", [8, 4])
def test_a_quantized_matrix_is_the_one_that_serves(num_bits):
    module = runpy.run_path(str(SCRIPT), run_name="recipe")
    linear = torch.nn.Linear(64, 48, bias=False)
    quantized = module["QuantizedLinear"](linear, num_bits)
    expected = round_to_groups(linear.weight.detach(), num_bits=num_bits).dequantize()
    assert torch.equal(quantized.weight, expected)
    assert quantized.values.numel() == 64 * 48 * num_bits // 8
    x = torch.randn(5, 64, requires_grad=True)
    y = quantized(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, x @ expected.T)
    torch.testing.assert_close(x.grad, 2 * y @ expected)


@pytest.mark.parametrize(
    "options", [("--quantize", "int4"), ("--precision", "bfloat16"), ("--quantize", "int8", "--precision", "bfloat16")]
)
def test_it_learns_beside_rounded_weights_and_with_rounded_products(data, tmp_path, monkeypatch, options):
    out = tmp_path / "out"
    run(monkeypatch, data, "--output", out, "--steps", "8", *OPTIONS, *options)
    state = adapter(out)
    assert state["losses"][-1] < state["losses"][0] - 1
    assert {tensor.dtype for tensor in state["adapter"].values()} == {torch.float32}


def test_other_options_for_the_same_folder_are_refused(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(monkeypatch, data, "--output", out, "--steps", "1", *OPTIONS)
    with pytest.raises(SystemExit, match="has a training with --rank 4"):
        run(monkeypatch, data, "--output", out, "--steps", "2", *OPTIONS, "--rank", "8")


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
