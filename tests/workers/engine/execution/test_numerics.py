"""The fingerprint of what a replica computes: the same for the same bits, and another one as soon as something gives others.

What limits of instruction sets do to it is in tests/cluster/router/test_failover_numerics.py.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config
from support.native import native_library
from support.ranks.rank_threads import run_ranks

from workers.engine import build
from workers.engine.build import build_runner
from workers.engine.execution.model_runner import ModelRunner
from workers.engine.execution.numerics import fingerprint
from workers.kernels.lora.native_table import NativeLoraTable
from workers.kernels.lora.table import TorchLoraTable
from workers.kernels.quantized_kv import parts_of
from workers.parallel.group import SingleRank, TensorParallel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), sliding_window=None)


def built(folder, tp: TensorParallel | None = None, **overrides) -> ModelRunner:
    tp = tp or SingleRank()
    runner = build_runner(make_config(folder, tensor_parallel_size=tp.size, **overrides), tp)
    runner.allocate_kv_cache()
    return runner


def nudge(weight: torch.Tensor) -> None:
    """Doubles one number."""
    flat = weight.data.view(-1)
    flat[0] = 2 * flat[0] if flat[0] else 1


def test_equal_replicas_have_one_fingerprint_which_says_what_they_are(folder) -> None:
    found = {fingerprint(built(folder)) for _ in range(2)}
    (name,) = found
    assert name is not None and name.startswith("float32-") and "-tp1-" in name
    runner = built(folder, num_threads=2)
    num_threads = torch.get_num_threads()
    assert [fingerprint(runner) for _ in range(2)] == [name] * 2, "it depends neither on threads nor on what ran before"
    assert torch.get_num_threads() == num_threads, "the caller's setting is left as it was"


def test_what_computes_other_bits_has_another(folder, tmp_path) -> None:
    other_weights = write_tiny_checkpoint(tmp_path, sliding_window=None, seed=1)
    slightly_other = built(folder)
    nudge(slightly_other.model.model.norm.weight)
    runners = [built(folder), built(folder, dtype="bfloat16"), built(other_weights), slightly_other]
    runners += [built(folder, kv_cache_dtype=form) for form in ("int8", "fp8")]
    assert len({fingerprint(runner) for runner in runners}) == len(runners)


def test_the_kernels_of_adapters_count_where_there_are_some(folder, monkeypatch) -> None:
    runner = built(folder, enable_lora=True, max_loras=1)
    found = fingerprint(runner)
    assert found == fingerprint(runner) == fingerprint(built(folder, enable_lora=True)) != fingerprint(built(folder))
    monkeypatch.setattr(TorchLoraTable, "add", lambda self, out, x, rows: None)
    monkeypatch.setattr(NativeLoraTable, "add", lambda self, out, x, rows: None)
    assert fingerprint(runner) != found


@pytest.mark.parametrize("whole", ["first layer and head", "all"])
def test_weights_that_only_some_layers_have_count(whole, folder, tmp_path, monkeypatch) -> None:
    """Of the two instruction sets, AMX multiplies weights in float32 that bfloat16 holds in its own way, and all others as AVX-512."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if whole == "first layer and head" and "layers.1" in name and "norm" not in name:
            tensors[name] = tensor.bfloat16().float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    names = []
    for variant in ("amx", "avx512"):
        library = native_library(variant)
        monkeypatch.setattr(build, "load_library", lambda library=library: library)
        names.append(fingerprint(built(tmp_path)))
    assert (names[0] == names[1]) == (whole == "all")


@pytest.mark.parametrize("max_model_len", [1, 8, 100])
def test_models_of_any_length_have_one(folder, max_model_len: int) -> None:
    runner = built(folder, max_model_len=max_model_len, num_kv_blocks=40)
    assert fingerprint(runner) == fingerprint(runner)


@pytest.mark.parametrize("form", ["auto", "int8", "fp8"])
def test_it_leaves_the_cache_alone(folder, form) -> None:
    runner = built(folder, kv_cache_dtype=form)
    name = fingerprint(runner)
    assert name is not None and (form == "auto") == ("-kv" not in name)
    tensors = [part for layer in runner.kv_cache for cache in layer for part in parts_of(cache) if part is not None]
    assert len(tensors) == len(runner.kv_cache) * (2 if form == "auto" else 4)
    assert not any(tensor.view(torch.uint8).any() for tensor in tensors)


@pytest.mark.group
def test_every_rank_counts(folder) -> None:
    def program(tp: TensorParallel) -> list[str | None]:
        runner = built(folder, tp)
        found = [fingerprint(runner), fingerprint(runner)]
        if tp.rank == 1:
            nudge(runner.model.model.layers[0].input_layernorm.weight)
        return [*found, fingerprint(runner)]

    (first, again, changed), others = run_ranks(2, program)
    assert others == [None] * 3, "only rank 0 knows all ranks' parts"
    assert first is not None and "-tp2-" in first
    assert first == again
    assert changed != first
