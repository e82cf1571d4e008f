"""adapter_config.json of a PEFT folder: what it says of ranks and scales. Refuses by name what would make other numbers than base + B A.

Knows PEFT's fields; no tensors, no model and no torch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.checkpoint.regular_file import read_object, shown
from workers.errors import CheckpointError, ConfigError

CONFIG_FILE = "adapter_config.json"
# The linear layers of a decoder layer, as PEFT and checkpoints name them.
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
MODULES = (*ATTENTION_MODULES, *MLP_MODULES)
TRAIN_WITHOUT = "Train it without, as LoRA on linear layers only."
# Fields that must be empty, and what they would ask for.
_UNSUPPORTED = {
    "use_dora": "DoRA (use_dora)",
    "modules_to_save": "whole modules beside LoRA (modules_to_save)",
    "lora_bias": "biases in its LoRA layers (lora_bias)",
    "layer_replication": "repeated layers (layer_replication)",
    "trainable_token_indices": "trained rows of the embedding (trainable_token_indices)",
    "target_parameters": "LoRA on parameters outside of linear layers (target_parameters)",
    "alora_invocation_tokens": "Activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA (use_qalora)",
    "fan_in_fan_out": "transposed layers (fan_in_fan_out)",
    "arrow_config": "Arrow routing (arrow_config)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "megatron_config": "Megatron layers (megatron_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}
# These ways to begin training also change the base model's weights, which the adapter then depends on.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """rank, alpha: of modules that no pattern names. The patterns map PEFT's regular expressions to other values."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str | None
    fields: Mapping[str, Any]

    def rank_of(self, module: str) -> int:
        """module: its name in the base model, such as model.layers.0.self_attn.q_proj."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(folder: Path) -> LoraSettings:
    """Raises CheckpointError for a folder that is not a PEFT adapter, or one with what is not supported."""
    try:
        fields = read_object(folder, CONFIG_FILE)
    except ConfigError as e:
        raise CheckpointError(e.message, remedy=e.remedy) from e
    if fields is None:
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}, so it is not a PEFT adapter.",
            remedy="Name the folder that PEFT's save_pretrained wrote.",
        )
    path = folder / CONFIG_FILE
    _check_kind(path, fields)
    _check_targets(path, fields.get("target_modules"))
    return LoraSettings(
        rank=_number(path, "r", fields.get("r"), whole=True),
        alpha=_number(path, "lora_alpha", fields.get("lora_alpha")),
        use_rslora=bool(fields.get("use_rslora")),
        rank_pattern=_pattern(path, "rank_pattern", fields, whole=True),
        alpha_pattern=_pattern(path, "alpha_pattern", fields),
        base_model=name if isinstance(name := fields.get("base_model_name_or_path"), str) and name else None,
        fields=fields,
    )


def _check_kind(path: Path, fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path} names the peft_type {shown(kind)}, and only LORA is supported.",
            remedy="Train the adapter with peft.LoraConfig.",
        )
    for name, what in _UNSUPPORTED.items():
        if fields.get(name):
            raise CheckpointError(f"{path} asks for {what}, which is not supported.", remedy=TRAIN_WITHOUT)
    if (bias := fields.get("bias", "none")) != "none":
        raise CheckpointError(
            f"{path} has trained biases (bias {shown(bias)}), which are not supported.",
            remedy='Train it with bias "none".',
        )
    begins = str(fields.get("init_lora_weights", "")).lower()
    if begins.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path} says that training began with {shown(begins)}, which changes the base model's weights as well.",
            remedy="Save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter.",
        )


def _check_targets(path: Path, targets: object) -> None:
    """A text is a regular expression or "all-linear": then the tensors show what it matched."""
    if not isinstance(targets, list):
        return
    for target in targets:
        if str(target).rsplit(".", 1)[-1] not in MODULES:
            raise CheckpointError(
                f"{path} has the target module {shown(target)}, which takes no adapter here.",
                remedy=f"Train it on some of {', '.join(MODULES)}.",
            )


def _number(path: Path, name: str, value: object, *, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not math.isfinite(value) or (whole and value < 1):  # type: ignore[arg-type, operator]
        what = "a whole number from 1 on" if whole else "a number"
        raise CheckpointError(f"{path} has the {name} {shown(value)}, not {what}.", remedy="Save the adapter again.")
    return value


def _pattern(path: Path, name: str, fields: Mapping[str, Any], *, whole: bool = False) -> dict[str, Any]:
    found = fields.get(name) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} has the {name} {shown(found)}, not an object.", remedy="Save the adapter again.")
    for pattern, value in found.items():
        _number(path, f"{name} of {shown(pattern)}", value, whole=whole)
        try:
            re.compile(pattern)
        except re.error as e:
            raise CheckpointError(
                f"{path} has {shown(pattern)} in its {name}, which is not a regular expression: {e}.",
                remedy="Save the adapter again.",
            ) from e
    return found


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """As peft.utils.get_pattern_key: the first expression that matches the name or its end after a dot."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
