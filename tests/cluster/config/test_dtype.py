"""What --dtype auto means, from the checkpoint and the CPUs; and the checkpoint's type, from its files."""

import json
from dataclasses import replace

import pytest
import torch
from support.checkpoints.gguf_files import write_gguf
from support.checkpoints.tiny import write_tiny_checkpoint

from cluster.config import dtype as dtype_module
from cluster.config.dtype import NodeCpu, choose_dtype, keeps_more_in_float32, keeps_narrow, stored_dtype, this_machine
from workers.checkpoint.model_config import load_model_config
from workers.native.bfloat16 import Bfloat16Support

NEW = NodeCpu(where="node 10.0.0.1", bfloat16=Bfloat16Support(instructions="avx512_bf16"))
ARM = NodeCpu(where="node 10.0.0.2", bfloat16=Bfloat16Support(instructions="bf16"))
OLD = NodeCpu(where="node 10.0.0.3", bfloat16=Bfloat16Support(obstacle="has no instructions for bfloat16."))
SILENT = NodeCpu(where="node 10.0.0.4", bfloat16=None)


@pytest.mark.parametrize(
    ("stored", "cpus", "dtype", "reason"),
    [
        ("bfloat16", [NEW], "bfloat16", "bfloat16, as the checkpoint; the CPU has instructions for it (AVX512_BF16)."),
        ("bfloat16", [NEW, NEW, ARM], "bfloat16", "(AVX512_BF16, BF16)"),
        ("bfloat16", [NEW, OLD], "float32", "float32, because node 10.0.0.3 has no instructions for bfloat16."),
        ("bfloat16", [SILENT, NEW], "float32", "float32, because node 10.0.0.4 does not say what its CPU has."),
        ("bfloat16", [], "float32", "float32, because no node with CPUs has joined the Ray cluster yet."),
        ("float32", [NEW], "float32", "float32, because the checkpoint is in float32."),
        ("float16", [NEW], "float32", "float32, because the checkpoint is in float16."),
    ],
)
def test_the_cpu_computes_bfloat16_where_all_of_them_have_it(stored, cpus, dtype, reason):
    choice = choose_dtype("auto", device="cpu", stored=stored, cpus=lambda: cpus)
    assert choice.dtype == dtype
    assert choice.reason is not None and reason in choice.reason


def unused():
    raise AssertionError("the CPUs decide nothing here, and asking a cluster takes a second")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_the_cpus_are_asked_only_where_they_decide(stored):
    for device in ("cpu", "cuda"):
        for requested in ("float32", "bfloat16", "float16"):
            choice = choose_dtype(requested, device=device, stored=stored, cpus=unused)
            assert (choice.dtype, choice.reason) == (requested, None)
    choice = choose_dtype("auto", device="cuda", stored=stored, cpus=unused)
    assert (choice.dtype, choice.reason) == (stored, None)


def test_this_machine_is_one_cpu():
    (cpu,) = this_machine()
    assert cpu.where == "this machine" and cpu.bfloat16 is not None


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_the_type_is_that_of_the_files(tmp_path, layout, dtype, name):
    """params.json names none."""
    folder = write_tiny_checkpoint(tmp_path, layout=layout, dtype=dtype, num_shards=2)
    assert stored_dtype(folder, load_model_config(folder)) == name


def test_weights_of_bfloat16_take_half_of_float32_with_the_compiled_kernels(tmp_path, monkeypatch):
    model = load_model_config(write_tiny_checkpoint(tmp_path))
    quantised = replace(model, stored=load_model_config(write_gguf(tmp_path / "model.gguf", dtype="Q4_0")).stored)
    for has_kernels in (True, False):
        monkeypatch.setattr(dtype_module, "keeps_narrow_weights", lambda has=has_kernels: has)
        assert keeps_narrow("float32", device="cpu", stored="bfloat16", model=model) == has_kernels
    monkeypatch.setattr(dtype_module, "keeps_narrow_weights", lambda: True)
    assert not keeps_narrow("float32", device="cpu", stored="float32", model=model)
    assert not keeps_narrow("bfloat16", device="cpu", stored="bfloat16", model=model)
    assert not keeps_narrow("float32", device="cuda", stored="bfloat16", model=model)
    assert not keeps_narrow("float32", device="cpu", stored="bfloat16", model=quantised)


def test_the_configuration_counts_where_the_files_cannot_be_read(tmp_path):
    folder = write_tiny_checkpoint(tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"dtype": "float16"}))
    assert stored_dtype(folder, load_model_config(folder)) == "float32"
    (folder / "model.safetensors").write_bytes(b"no header")
    assert stored_dtype(folder, load_model_config(folder)) == "float16"


def test_a_quantised_gguf_file_computes_in_float32_on_the_cpu(tmp_path):
    """Its norms and scales are float32. On CUDA it computes in 16 bits, as everything does there."""
    model = load_model_config(write_gguf(tmp_path / "model.gguf", dtype="Q4_0"))
    dense = load_model_config(write_gguf(tmp_path / "dense.gguf", dtype="BF16"))
    assert keeps_more_in_float32(model) and not keeps_more_in_float32(dense)
    assert stored_dtype(tmp_path / "model.gguf", model) == "bfloat16"
    for device, expected in (("cpu", "float32"), ("cuda", "bfloat16")):
        choice = choose_dtype("auto", device=device, stored="bfloat16", cpus=this_machine, keeps_more=True)
        assert choice.dtype == expected
