"""Writes a quantised checkpoint and, beside it, the dense one with the same meaning."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.checkpoints.quantized import packers
from support.checkpoints.tiny import make_tiny_model

# Wide enough for groups of 32 on two ranks.
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def compressed(scheme: dict[str, Any], *, form: str, **more: Any) -> dict[str, Any]:
    """quantization_config of compressed-tensors with one scheme for all linear layers."""
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


@dataclass(frozen=True)
class Kind:
    """pack: of `packers`, with arguments. config: quantization_config."""

    pack: Any
    arguments: dict[str, Any]
    config: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)


def _gptq(
    *, bits: int = 4, group_size: int = 32, sym: bool = True, desc_act: bool = False, version: str = "gptq", **more: Any
) -> Kind:
    arguments = {
        "num_bits": bits,
        "group_size": group_size,
        "symmetric": sym,
        "act_order": desc_act,
        "less_one": version == "gptq",
    }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": version,
    }
    return Kind(packers.gptq, arguments | more, config)


def _compressed(pack: Any, form: str, arguments: dict[str, Any], scheme: dict[str, Any], **more: Any) -> Kind:
    return Kind(pack, arguments, compressed(scheme, form=form, **more))


INT4, INT8, FP8 = (
    {"num_bits": bits, "type": kind, "symmetric": True} for bits, kind in ((4, "int"), (8, "int"), (8, "float"))
)
KINDS: dict[str, Kind] = {
    "gptq": _gptq(),
    "gptq without groups": _gptq(group_size=-1),
    "gptq of 8 bits": _gptq(bits=8),
    "gptq of 8 bits, asymmetric": _gptq(bits=8, sym=False),
    "gptq, asymmetric": _gptq(sym=False),
    "gptq_v2, asymmetric": _gptq(sym=False, version="gptq_v2"),
    "gptq, act-order": _gptq(desc_act=True),
    "gptq, act-order, asymmetric": _gptq(desc_act=True, sym=False),
    "gptq, groups of 16": _gptq(group_size=16),
    "gptq, bfloat16": _gptq(scale_dtype=torch.bfloat16, sym=False),
    "awq": Kind(
        packers.awq, {}, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    ),
    "pack-quantized": _compressed(
        packers.pack_quantized, "pack-quantized", {}, INT4 | {"strategy": "group", "group_size": 32}
    ),
    "pack-quantized, asymmetric, act-order": _compressed(
        packers.pack_quantized,
        "pack-quantized",
        {"symmetric": False, "act_order": True},
        INT4 | {"strategy": "group", "group_size": 32, "symmetric": False, "actorder": "group"},
    ),
    "pack-quantized of 8 bits, rows": _compressed(
        packers.pack_quantized, "pack-quantized", {"num_bits": 8, "group_size": None}, INT8 | {"strategy": "channel"}
    ),
    "int-quantized": _compressed(packers.int_quantized, "int-quantized", {}, INT8 | {"strategy": "channel"}),
    "int-quantized, groups, asymmetric": _compressed(
        packers.int_quantized,
        "int-quantized",
        {"group_size": 32, "symmetric": False},
        INT8 | {"strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "float-quantized": _compressed(packers.float8, "float-quantized", {"per": "row"}, FP8 | {"strategy": "channel"}),
    "float-quantized, blocks": _compressed(
        packers.float8, "float-quantized", {"per": "block"}, FP8 | {"strategy": "block", "block_structure": [32, 32]}
    ),
    "fp8, static": Kind(packers.float8, {"static": True}, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8, dynamic": Kind(
        packers.float8,
        {"per": "block", "name": "weight_scale_inv"},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"},
    ),
}


def write_quantized(
    folder: Path, kind: str | Kind, *, dense: tuple[str, ...] = ("lm_head",), **overrides: Any
) -> tuple[Path, Path]:
    """Two folders: the quantised checkpoint, and a dense one of what it means. dense: parts of names of modules that stay as they are."""
    kind = KINDS[kind] if isinstance(kind, str) else kind
    model = make_tiny_model(**{**WIDE, **kind.overrides, **overrides})
    quantized, meant = folder / "quantized", folder / "meant"
    tensors = {}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module not in linear or any(part in name for part in dense):
            tensors[name] = parameter.detach()
            continue
        parts, value = kind.pack(parameter.detach(), **kind.arguments)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
        parameter.data = value
    model.save_pretrained(meant)
    (meant / "generation_config.json").unlink(missing_ok=True)
    quantized.mkdir(parents=True)
    save_file(tensors, quantized / "model.safetensors")
    config = json.loads((meant / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": kind.config}))
    return quantized, meant
