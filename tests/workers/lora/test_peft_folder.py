"""PEFT folders: what is read from them, and every refusal by name."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.adapters import write_adapter, write_folder, write_with_peft
from support.checkpoints.tiny import make_tiny_model, write_tiny_checkpoint

from workers.checkpoint.model_config import load_model_config
from workers.errors import CheckpointError
from workers.lora.peft_config import read_settings
from workers.lora.peft_folder import open_adapter, read_adapter

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model_config(write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_folder_that_peft_wrote(model, tmp_path):
    write_with_peft(
        tmp_path,
        make_tiny_model(),
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 7},
    )
    info = read_adapter(tmp_path, model, max_rank=64)
    assert (info.rank, info.alpha, info.modules) == (7, 6, ("down_proj", "q_proj"))
    pairs = open_adapter(tmp_path, model, max_rank=64).pairs
    assert pairs[1, "q_proj"].a == "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert {(key, pair.rank, pair.scale) for key, pair in pairs.items()} == {
        *(((layer, "q_proj"), 7, 6 / 7) for layer in (0, 1)),
        *(((layer, "down_proj"), 3, 2.0) for layer in (0, 1)),
    }
    assert info.num_bytes == sum(x.nbytes for x in load_file(tmp_path / "adapter_model.safetensors").values())


def test_the_digest_changes_with_the_content_and_not_with_the_format(model, tmp_path):
    folder = write_adapter(tmp_path, model)
    digest = read_adapter(folder, model, max_rank=64).digest
    assert len(digest) == 12 and int(digest, 16) >= 0
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=4))
    assert read_adapter(folder, model, max_rank=64).digest == digest
    change_config(folder, lora_alpha=9)
    assert read_adapter(folder, model, max_rank=64).digest != digest
    change_config(folder, lora_alpha=8)
    assert read_adapter(folder, model, max_rank=64).digest == digest
    change_tensors(folder, lambda tensors: tensors[f"{Q_PROJ}.lora_A.weight"].add_(1))
    assert read_adapter(folder, model, max_rank=64).digest != digest


def test_names_with_an_adapters_name_and_without_the_wrappers(model, tmp_path):
    a, b = torch.zeros(4, 64), torch.zeros(64, 4)
    folder = write_folder(
        tmp_path,
        {
            f"{Q_PROJ}.lora_A.default.weight": a,
            f"{Q_PROJ}.lora_B.default.weight": b,
            "base_model.model.layers.1.self_attn.q_proj.lora_A.weight": a.clone(),
            "base_model.model.layers.1.self_attn.q_proj.lora_B.weight": b.clone(),
        },
    )
    assert set(open_adapter(folder, model, max_rank=4).pairs) == {(0, "q_proj"), (1, "q_proj")}


def test_scales(model, tmp_path):
    folder = write_adapter(tmp_path, model, rank=4, modules=("q_proj",), use_rslora=True, lora_alpha=3)
    assert read_settings(folder).scale_of("model.layers.0.self_attn.q_proj") == 3 / 2
    change_config(folder, alpha_pattern={r"layers\.0\.self_attn\.q_proj": 5}, rank_pattern={})
    assert [read_settings(folder).scale_of(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1, 10)] == [2.5, 1.5, 1.5]
    change_config(folder, use_rslora=False)
    assert math.isclose(read_settings(folder).scale_of("model.layers.1.self_attn.q_proj"), 3 / 4)


REFUSED_SETTINGS = [
    ({"peft_type": "LOHA"}, "the peft_type 'LOHA', and only LORA"),
    ({"use_dora": True}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "lora_only"}, "bias 'lora_only'"),
    ({"lora_bias": True}, "lora_bias"),
    ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ({"target_parameters": ["experts"]}, "target_parameters"),
    ({"alora_invocation_tokens": [5, 6]}, "Activated LoRA"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base model"),
    ({"target_modules": ["q_proj", "lm_head"]}, "the target module 'lm_head'"),
    ({"target_modules": ["c_attn"]}, "the target module 'c_attn'"),
    ({"r": 0}, "the r 0"),
    ({"r": "4"}, "the r '4'"),
    ({"lora_alpha": float("nan")}, "the lora_alpha nan"),
    ({"rank_pattern": {"(": 4}}, "not a regular expression"),
    ({"rank_pattern": {"q_proj": 4.5}}, "the rank_pattern of 'q_proj' 4.5"),
    ({"alpha_pattern": [1]}, "the alpha_pattern"),
    ({"r": 5}, "has shape [4, 96], but this model and rank 5 ask for [5, 96]"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_SETTINGS, ids=[str(fields) for fields, _ in REFUSED_SETTINGS])
def test_settings_that_are_refused_by_name(fields, message, model, tmp_path):
    folder = write_adapter(tmp_path, model)
    change_config(folder, **fields)
    with pytest.raises(CheckpointError) as refused:
        read_adapter(folder, model, max_rank=64)
    assert message in refused.value.message and refused.value.remedy


REFUSED_TENSORS = [
    ("lm_head", {"base_model.model.lm_head.lora_A.weight": (4, 64)}, "the embedding or the output head"),
    (
        "embedding",
        {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 64)},
        "the embedding or the output head",
    ),
    ("DoRA", {f"{Q_PROJ}.lora_magnitude_vector": (64,)}, "DoRA"),
    ("experts", {"base_model.model.model.layers.0.block_sparse_moe.gate.lora_A.weight": (4, 64)}, "not a LoRA tensor"),
    ("a module elsewhere", {"base_model.model.model.layers.0.mlp.q_proj.lora_A.weight": (4, 64)}, "not a LoRA tensor"),
    ("a layer too many", {Q_PROJ.replace("0", "2") + ".lora_A.weight": (4, 64)}, "the layers 0 to 1"),
    ("A without B", {f"{Q_PROJ}.lora_A.weight": (4, 64)}, "not the B that belongs to it"),
    ("two", {f"{Q_PROJ}.lora_A.x.weight": (4, 64), f"{Q_PROJ}.lora_A.y.weight": (4, 64)}, "two tensors A"),
    (
        "another model",
        {f"{Q_PROJ}.lora_A.weight": (4, 32), f"{Q_PROJ}.lora_B.weight": (64, 4)},
        "has shape [4, 32], but this model and rank 4 ask for [4, 64]",
    ),
    ("nothing", {}, "has no tensors"),
]


@pytest.mark.parametrize(
    ("shapes", "message"), [case[1:] for case in REFUSED_TENSORS], ids=[c[0] for c in REFUSED_TENSORS]
)
def test_tensors_that_are_refused_by_name(shapes, message, model, tmp_path):
    folder = write_folder(tmp_path, {name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError) as refused:
        read_adapter(folder, model, max_rank=64)
    assert message in refused.value.message and refused.value.remedy


def test_a_rank_above_the_limit(model, tmp_path):
    folder = write_adapter(tmp_path, model, rank=9, modules=("q_proj",))
    with pytest.raises(
        CheckpointError, match=r"rank 9 in q_proj of layer 0, more than the 8 of --max-lora-rank.*Raise.* to 9"
    ):
        read_adapter(folder, model, max_rank=8)
    folder = write_adapter(tmp_path, model, rank=257, modules=("q_proj",))
    with pytest.raises(CheckpointError, match="Train it with at most rank 256"):
        read_adapter(folder, model, max_rank=256)


def test_files_that_are_missing_or_damaged(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path, model, max_rank=64)
    folder = write_adapter(tmp_path, model)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        read_adapter(folder, model, max_rank=64)
    change_type = {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}
    save_file(change_type, weights)
    with pytest.raises(CheckpointError, match="the type I8, not a float"):
        read_adapter(folder, model, max_rank=64)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder, model, max_rank=64)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a pickle file"):
        read_adapter(folder, model, max_rank=64)
    weights.symlink_to(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_adapter(folder, model, max_rank=64)
