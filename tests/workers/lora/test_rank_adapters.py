"""What a rank keeps of adapters: numbers that it cannot use are refused, and one that is unloaded goes when both sides have said so."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.adapters import write_adapter
from support.checkpoints.tiny import write_tiny_checkpoint

from workers.checkpoint.model_config import load_model_config
from workers.errors import CheckpointError
from workers.kernels.lora.table import TorchLoraTable
from workers.lora.layer import LoraLayer, LoraModule
from workers.lora.rank_adapters import RankAdapters, adapter_key

WHOLE = (slice(None),), slice(None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model_config(write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def make_adapters(model, dtype=torch.float32):
    table = TorchLoraTable(64, [64], num_slots=2, dtype=dtype, device=torch.device("cpu"))
    layer = LoraLayer(0, (LoraModule("q_proj", *WHOLE),), table)
    return RankAdapters([layer], model=model, num_slots=2, max_rank=8)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float32, "infinite numbers or NaN"),
        (float("inf"), torch.bfloat16, "infinite numbers or NaN"),
        (1e6, torch.float16, "numbers too large for float16"),
    ],
)
def test_numbers_that_cannot_be_used(value, dtype, message, model, tmp_path):
    folder = write_adapter(tmp_path, model, modules=("q_proj",))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors[name][3, 1] = value
    save_file(tensors, path)
    adapters = make_adapters(model, dtype)
    with pytest.raises(CheckpointError, match=f"q_proj.lora_B.* has {message}"):
        adapters.load("a", folder)
    assert adapters.revisions() == ()


@pytest.mark.parametrize("first", ["the rank's owner", "rank 0"])
def test_an_adapter_goes_when_both_have_said_so(first, model, tmp_path):
    adapters, key = make_adapters(model), adapter_key("a")
    folder = write_adapter(tmp_path, model, modules=("q_proj",))
    adapters.load("a", folder)
    assert "a" in adapters and adapters.put(1, key)
    steps = [lambda: adapters.unload("a", at_once=False), lambda: adapters.forget(key)]
    for step in steps if first != "rank 0" else reversed(steps):
        assert adapters.put(0, key)
        step()
    assert not adapters.put(0, key) and "a" not in adapters
    adapters.load("a", folder)
    assert adapters.put(0, key), "loaded again"
    adapters.unload("a", at_once=False)
    adapters.load("a", folder)
    adapters.forget(key)
    assert "a" in adapters and adapters.put(0, key), "it was loaded again before rank 0 let it go"


def test_before_there_is_an_engine_it_goes_at_once(model, tmp_path):
    adapters = make_adapters(model)
    adapters.load("a", write_adapter(tmp_path, model, modules=("q_proj",)))
    adapters.unload("a", at_once=True)
    adapters.unload("a", at_once=True)
    assert not adapters.put(0, adapter_key("a"))


def test_keys_are_two_numbers_that_a_message_can_carry():
    keys = {adapter_key(f"a@{i:012x}") for i in range(1000)}
    assert len(keys) == 1000
    assert all(0 <= number < 2**31 for key in keys for number in key)
