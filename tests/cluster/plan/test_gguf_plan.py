"""Plans for GGUF files: the bytes of their own types, on GPUs and on the CPU, and the files that a task takes along."""

from dataclasses import replace
from pathlib import Path

import yaml
from support.checkpoints.gguf_files import LARGE, write_gguf
from support.checkpoints.tiny import make_tiny_model
from support.vocabularies.gguf_vocabulary import byte_level_metadata

from cluster.cli.main import main
from cluster.doctor.model_files import read_model
from cluster.plan.gpus import GPUS
from cluster.plan.models import V0_3, PlannedModel
from cluster.plan.planner import Question, make_plan
from cluster.plan.roofline import Workload
from workers.checkpoint.gguf.gguf_file import GgufTensor
from workers.checkpoint.gguf.gguf_stored import read_stored
from workers.device.model_bytes import weight_bytes

PATH = Path("model.gguf")


def q4_k_m():
    """The tensors of Mistral 7B v0.3 in llama.cpp's Q4_K_M: value and down projections of half the layers, and the head, are in Q6_K."""
    hidden, kv, ffn, vocab = 4096, 1024, 14_336, 32_768
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
    }
    shapes |= {"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}
    tensors = {"token_embd.weight": ("Q4_K", (vocab, hidden)), "output.weight": ("Q6_K", (vocab, hidden))}
    for layer in range(32):
        for name, shape in shapes.items():
            kind = "Q6_K" if layer % 2 and name in ("attn_v", "ffn_down") else "Q4_K"
            tensors[f"blk.{layer}.{name}.weight"] = (kind, shape)
    return {name: GgufTensor(PATH, kind, shape, 0, 0) for name, (kind, shape) in tensors.items()}


def plan_of(config, *, gpu, context):
    work = Workload(context=context, concurrency=1, prompt_tokens=context // 2)
    question = Question(model=PlannedModel(name="mistral-7b", config=config), workload=work, dtype="bfloat16")
    return question.engine(1, GPUS[gpu]), make_plan(question, GPUS[gpu], 1)


def test_7b_in_q4_k_m():
    """Q4_K takes 6 bits with its float32 scales, Q6_K 18; a seventh of the layers' 6.98 billion weights is in the latter."""
    config = replace(V0_3, stored=read_stored(q4_k_m()), layout="gguf")
    engine, plan = plan_of(config, gpu="L4", context=32_768)
    share = (67_108_864 + 939_524_096) / 6_979_321_856
    layers, table, head = 6_979_321_856 * (6 + 12 * share) / 8, 2 * 134_217_728, 134_217_728 * 18 / 8
    norms = 65 * 4096 * 2
    assert weight_bytes(engine) == round(layers + table + head + norms)
    assert plan.fits, "24 GB hold it with 32k of context"
    _, dense = plan_of(V0_3, gpu="L4", context=32_768)
    assert plan.memory.kv_cache_bytes > dense.memory.kv_cache_bytes + 7e9
    assert plan.speed.step_s < 0.6 * dense.speed.step_s, "a step reads the bits that are kept"


def tiny(folder, **settings):
    folder.mkdir(exist_ok=True)
    metadata = byte_level_metadata("smollm")
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    model = make_tiny_model(sliding_window=None, **LARGE, vocab_size=vocab_size)
    metadata["llama.vocab_size"] = vocab_size
    return write_gguf(folder / "tiny.gguf", model, dtype="Q4_K", metadata=metadata, **settings)


def test_the_commands_and_files_of_a_plan(tmp_path, capsys):
    """A task takes all parts of a split file along, and serves the first."""
    first = tiny(tmp_path / "model", split_max_tensors=5)
    assert main(["plan", str(first), "--gpu", "cpu", "--memory", "8GiB", "--context", "64"]) == 0
    said = capsys.readouterr().out
    assert "GGUF Q4_K" in said and f"tramontane serve {first} --device cpu" in said
    task = tmp_path / "task.yaml"
    assert main(["plan", str(first.parent), "--gpu", "L4", "--context", "64", "--write", str(task)]) == 0
    written = yaml.safe_load(task.read_text())
    parts = sorted(first.parent.iterdir())
    assert list(written["file_mounts"].values()) == [str(part) for part in parts] and len(parts) == 3
    assert written["envs"]["MODEL"] == next(iter(written["file_mounts"])) and written["envs"]["MODEL"].endswith(
        first.name
    )
    assert "--served-model-name tiny" in written["envs"]["SERVE_OPTIONS"]


def test_the_doctor_counts_what_the_weights_take(tmp_path):
    path = tiny(tmp_path / "model")
    model = read_model(str(path))
    assert model.faults == () and model.num_bytes == path.stat().st_size
    assert list(model.kept_bytes) == ["float32"] and model.kept_bytes["float32"] > model.num_bytes
    assert "GGUF file" in read_model(str(tmp_path / "missing.gguf")).faults[0].message
    path.write_bytes(path.read_bytes()[:-100])
    assert "is truncated" in read_model(str(path)).faults[0].message
