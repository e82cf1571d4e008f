"""The recipe of examples/finetune on the demo model: it learns, goes on after an interruption, and its result serves."""

import gc
import json
import runpy
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.paths import DEMO_MODEL, ROOT

from cluster.text.chat.template import Message
from cluster.text.load import load_text

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

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
    gc.freeze()  # before each training, garbage is collected: a second each time, among all that a session has imported
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(DEMO_MODEL), *map(str, arguments)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


def losses_of(folder):
    """As the newest checkpoint has them."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [entry["loss"] for entry in json.loads((newest / "trainer_state.json").read_text())["log_history"]]


def test_it_learns_and_goes_on_where_it_stopped(data, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, data, "--output", whole, "--steps", "8", *OPTIONS)
    losses = losses_of(whole)
    assert losses[-1] < losses[0] - 1
    assert (whole / "loss.png").stat().st_size > 1000
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (config["r"], config["task_type"]) == (4, "CAUSAL_LM")

    class Crash(Exception):
        pass

    def crash_after(self, *arguments, **more):
        save(self, *arguments, **more)
        raise Crash

    save = transformers.Trainer._save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", crash_after)
        with pytest.raises(Crash):
            run(patch, data, "--output", parts, "--steps", "8", *OPTIONS)
    assert len(losses_of(parts)) == 4
    # One that was being written when another crash came.
    (parts / "checkpoint-6").mkdir()
    (parts / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"half")
    run(monkeypatch, data, "--output", parts, "--steps", "8", *OPTIONS)
    assert "Going on from step 4." in capsys.readouterr().out
    assert losses_of(parts) == pytest.approx(losses, rel=1e-4)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (parts, whole))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(data, tmp_path, monkeypatch, capsys):
    out, arguments = tmp_path / "out", ("--steps", "5", *OPTIONS)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    class CtrlC(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGINT)

    def train(self, **options):
        self.add_callback(CtrlC)
        return train_whole(self, **options)

    train_whole = transformers.Trainer.train
    try:
        with monkeypatch.context() as patch:
            patch.setattr(transformers.Trainer, "train", train)
            with pytest.raises(SystemExit, match=r"Stopped at step 2\. The same command goes on"):
                run(patch, data, "--output", out, *arguments)
        run(monkeypatch, data, "--output", out, *arguments)
        shown = capsys.readouterr()
        assert "Going on from step 2." in shown.out and len(losses_of(out)) == 5
        assert "loss=" in shown.err and "{'" not in shown.out, "the loss stands beside the bar"
        (out / "adapter_model.safetensors").unlink()  # as if the crash had come just before it was written
        run(monkeypatch, data, "--output", out, *arguments)
        assert "has its 5 steps already. For more" in capsys.readouterr().out
        assert len(losses_of(out)) == 5 and (out / "adapter_model.safetensors").exists()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    found, labels = first["input_ids"], first["labels"]
    assert found[: len(ids)] == list(ids)
    assert labels[: len(ids)] == [module["IGNORED"]] * len(ids)
    assert labels[len(ids) :] == found[len(ids) :] and found[-1] == text.tokenizer.eos_token_id


def test_an_answer_beyond_the_longest_length_is_left_out(data, tmp_path, monkeypatch, capsys):
    long = {"messages": [{"role": "user", "content": "red " * 90}, {"role": "assistant", "content": "RED"}]}
    data.write_text(data.read_text() + "\n" + json.dumps(long))
    run(monkeypatch, data, "--output", tmp_path / "out", "--steps", "1", "--max-length", "40", *OPTIONS)
    assert "1 conversations have no answer within --max-length 40 tokens" in capsys.readouterr().out
    assert losses_of(tmp_path / "out")[0] > 0


@pytest.mark.parametrize(
    "options", [("--quantize", "int4"), ("--precision", "bfloat16"), ("--quantize", "int8", "--precision", "bfloat16")]
)
def test_it_learns_beside_rounded_weights_and_with_rounded_products(data, tmp_path, monkeypatch, options):
    out = tmp_path / "out"
    run(monkeypatch, data, "--output", out, "--steps", "8", *OPTIONS, *options)
    losses = losses_of(out)
    assert losses[-1] < losses[0] - 1
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.float32}


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
