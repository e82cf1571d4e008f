"""Quantised checkpoints that lack something, or whose parts do not fit: one sentence each, before and while weights are loaded."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.quantized.checkpoints import write_quantized
from support.fakes.engines import make_config

from workers.checkpoint.model_config import load_model_config
from workers.errors import CheckpointError, ConfigError
from workers.weights.completeness import check_tensors
from workers.weights.forms import read_forms
from workers.weights.header import read_header
from workers.weights.loader import FiniteTensor, open_sources

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def without(name):
    return lambda tensors: tensors.pop(name)


def with_value(name, value):
    return lambda tensors: tensors.update({name: value(tensors.get(name))})


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("gptq", without(f"{Q}.scales"), f"The quantized matrix {Q} lacks its tensor {Q}.scales"),
        ("gptq", without(f"{Q}.qweight"), f"The quantized matrix {Q} lacks its tensor {Q}.qweight"),
        ("awq", without(f"{Q}.qzeros"), f"The quantized matrix {Q} lacks its tensor {Q}.qzeros"),
        ("pack-quantized", without(f"{Q}.weight_scale"), f"{Q} lacks its tensor {Q}.weight_scale"),
        ("int-quantized", without(f"{Q}.weight"), f"{Q} lacks its tensor {Q}.weight"),
        (
            "int-quantized",
            without(f"{Q}.weight_scale"),
            f"{Q} lacks its tensor {Q}.weight_scale",
        ),
        (
            "fp8, static",
            without(f"{Q}.weight_scale"),
            f"{Q} lacks its tensor {Q}.weight_scale",
        ),
        ("gptq, act-order", without(f"{Q}.g_idx"), f"{Q} lacks its tensor {Q}.g_idx, which quantization_config says"),
        (
            "pack-quantized, asymmetric, act-order",
            without(f"{Q}.weight_g_idx"),
            f"lacks its tensor {Q}.weight_g_idx, which",
        ),
        (
            "pack-quantized, asymmetric, act-order",
            without(f"{Q}.weight_zero_point"),
            f"lacks its tensor {Q}.weight_zero_",
        ),
        (
            "int-quantized, groups, asymmetric",
            without(f"{Q}.weight_zero_point"),
            f"lacks its tensor {Q}.weight_zero_point",
        ),
        (
            "gptq",
            with_value(f"{Q}.scales", lambda t: t.double()),
            f"'{Q}.scales' of .* is of type F64, but its format has F16",
        ),
        (
            "gptq",
            with_value(f"{Q}.qweight", lambda t: t[:3].clone()),
            r"'.*q_proj.qweight' of .* has shape \[3, 64\], which is nei",
        ),
        (
            "gptq",
            with_value(f"{Q}.scales", lambda t: t[:, :60].clone()),
            r"has shape \[2, 60\], but the model's .* \[2, 64\]",
        ),
        (
            "gptq",
            with_value(f"{Q}.scales", lambda t: t[[0, 0, 0]]),
            r"\[3, 64\], which does not divide 64 inputs into equal",
        ),
        ("gptq", with_value(f"{Q}.g_idx", lambda t: t[1:].clone()), r"q_proj.g_idx' of .* has shape \[63\]"),
        ("awq", with_value(f"{Q}.qweight", lambda t: t[1:].clone()), r"q_proj.qweight' of .* has shape \[63, 8\]"),
        ("fp8, dynamic", with_value(f"{Q}.weight_scale_inv", lambda t: t[:1].clone()), r"\[1, 2\], which fits neither"),
        (
            "pack-quantized",
            with_value(f"{Q}.weight_packed", lambda t: t.view(torch.uint8)),
            "which is neither 4 nor 8 bits",
        ),
        (
            "gptq",
            with_value("model.layers.7.mlp.up_proj.qweight", lambda _: torch.zeros(8, 64, dtype=torch.int32)),
            "no place in",
        ),
        (
            "awq",
            with_value(f"{Q}.weight_packed", lambda _: torch.zeros(64, 8, dtype=torch.int32)),
            "weight_packed' of .* is of another format than the rest",
        ),
        (
            "pack-quantized",
            with_value(f"{DOWN}.weight_global_scale", lambda _: torch.ones(1)),
            "is of another format than",
        ),
    ],
)
def test_what_headers_show_is_found_before_loading(kind, damage, message, tmp_path):
    folder = damaged(tmp_path, kind, damage)
    config = load_model_config(folder)
    with pytest.raises(CheckpointError, match=message):
        check_tensors(folder, config, read_header(folder / "model.safetensors")[1])


def damaged(tmp_path, kind, damage):
    folder, _ = write_quantized(tmp_path, kind, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["gptq", "awq", "pack-quantized", "fp8, static"])
def test_a_whole_checkpoint_is_complete(kind, tmp_path):
    folder, _ = write_quantized(tmp_path, kind, num_hidden_layers=1)
    config = load_model_config(folder)
    check_tensors(folder, config, read_header(folder / "model.safetensors")[1])
    assert len(read_forms(folder, config)) == 7


def test_scales_must_be_finite_numbers(tmp_path):
    damage = with_value(f"{Q}.scales", lambda t: t.index_fill(0, torch.tensor([1]), torch.inf))
    folder = damaged(tmp_path, "gptq", damage)
    with (
        open_sources(folder, load_model_config(folder)) as sources,
        pytest.raises(CheckpointError, match=re.escape(f"Tensor '{Q}.qweight' of {folder}")),
    ):
        FiniteTensor(sources[f"{Q}.weight"])[:]


def test_groups_that_do_not_exist(tmp_path):
    damage = with_value(f"{Q}.g_idx", lambda t: t + 1)
    folder = damaged(tmp_path, "gptq, act-order", damage)
    with (
        open_sources(folder, load_model_config(folder)) as sources,
        pytest.raises(CheckpointError, match="has inputs of group 2, but scales of 2 groups"),
    ):
        sources[f"{Q}.weight"][:]


def test_a_configuration_that_says_nothing_of_it(tmp_path):
    folder, _ = write_quantized(tmp_path, "gptq", num_hidden_layers=1)
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        CheckpointError, match=r"has quantized weights \(.*\), but config.json has no quantization_config"
    ):
        check_tensors(folder, load_model_config(folder), read_header(folder / "model.safetensors")[1])


def test_ranks_divide_groups_only_at_their_ends(tmp_path):
    folder, _ = write_quantized(tmp_path, "gptq", num_hidden_layers=1, num_key_value_heads=8)
    with pytest.raises(
        ConfigError, match="groups of 32 inputs of the checkpoint's GPTQ int4 weights cannot be divided"
    ):
        make_config(folder, tensor_parallel_size=4)
    folder, _ = write_quantized(tmp_path / "more", "gptq, act-order", num_hidden_layers=1, num_key_value_heads=8)
    make_config(folder, tensor_parallel_size=4)
    with pytest.raises(
        ConfigError, match="--quantization int8 is for dense checkpoints, and this one has GPTQ int4 weights"
    ):
        make_config(folder, quantization="int8")
