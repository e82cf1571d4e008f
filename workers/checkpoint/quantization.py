"""quantization_config of config.json: which quantised checkpoints run, and what their fields say. Knows fields; no files and no tensors.

Bits and group sizes are read from the tensors' shapes where these tell them (weights/quantized), because a checkpoint may have several.
"""

from collections.abc import Mapping
from typing import Any

from workers.checkpoint.regular_file import shown
from workers.errors import ConfigError
from workers.stored_weights import SMALLEST_GROUP, StoredMethod, StoredWeights, grouped_bits

WHAT_RUNS = "GPTQ and AWQ with 4 bits, GPTQ with 8 bits, compressed-tensors with int4, int8 or float8 weights, and fp8 with e4m3 weights"
_REMEDY = f"Use {WHAT_RUNS}, or the float32, float16 or bfloat16 weights."
_GPTQ_METHODS: dict[str, StoredMethod] = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")


def read_quantization(fields: dict[str, Any]) -> StoredWeights | None:
    """None for a dense checkpoint. Raises ConfigError for a method or a variant of one that does not run here."""
    found = fields.get("quantization_config") or fields.get("compression_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise _refusal(f"quantization_config is {shown(found)}, not a JSON object.")
    method = found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else None)
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8}
    if not isinstance(method, str) or method not in readers:
        raise _refusal(
            f"The checkpoint is quantized by {shown(method) if method else 'an unknown method'}, which does not run here."
        )
    return readers[method](found)


def read_params_quantization(fields: dict[str, Any]) -> StoredWeights | None:
    """The same of params.json, where Mistral's own fp8 has other fields: qformat_weight and qscheme_act."""
    found = fields.get("quantization")
    if not found:
        return None
    if not isinstance(found, dict):
        raise _refusal(f"quantization is {shown(found)}, not a JSON object.")
    if "qformat_weight" not in found:
        return read_quantization({"quantization_config": found})
    if found["qformat_weight"] != "fp8_e4m3":
        raise _refusal(
            f"The checkpoint has weights of the format {shown(found['qformat_weight'])}, which do not run here."
        )
    if (scheme := found.get("qscheme_act")) not in (None, "NO_SCALES", "TENSOR"):
        raise _refusal(f"The checkpoint rounds inputs by the scheme {shown(scheme)}, which does not run here.")
    return _fp8({})


def old_quantization(files: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """The quantization_config of a folder whose config.json has none: AutoGPTQ and AutoAWQ wrote it to a file of its own at first.

    files: {name: its object}, of OLD_FILES.
    """
    for name, method in OLD_FILES.items():
        if found := files.get(name):
            is_awq = "w_bit" in found or "q_group_size" in found
            return {"quant_method": "awq" if is_awq else method} | found
    return None


def _gptq(found: dict[str, Any]) -> StoredWeights:
    checkpoint_format = found.get("checkpoint_format") or found.get("format") or "gptq"
    method = _GPTQ_METHODS.get(str(checkpoint_format))
    if method is None:
        raise _refusal(f"The checkpoint is of GPTQ in the format {shown(checkpoint_format)}, which does not run here.")
    num_bits, group_size = _bits(found, "bits", (4, 8)), _group_size(found, "group_size")
    is_symmetric = bool(found.get("sym", True))
    bits = _memory_bits(num_bits, group_size, has_minima=not is_symmetric, wide=not is_symmetric and num_bits == 8)
    return StoredWeights(
        method=method,
        label=f"GPTQ int{num_bits}",
        layer_bits=bits,
        file_bits=_file_bits(num_bits, group_size, has_zeros=True),
        head_bits=bits if found.get("lm_head") else None,
        group_size=None if found.get("desc_act") else group_size,
        needed=("g_idx",) if found.get("desc_act") else (),
    )


def _awq(found: dict[str, Any]) -> StoredWeights:
    version = str(found.get("version") or found.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise _refusal(f"The checkpoint is of AWQ in the version {shown(version)}, which does not run here.")
    num_bits = _bits(found, "bits" if "bits" in found else "w_bit", (4,))
    group_size = _group_size(found, "group_size" if "group_size" in found else "q_group_size")
    return StoredWeights(
        method="awq",
        label=f"AWQ int{num_bits}",
        layer_bits=_memory_bits(num_bits, group_size, has_minima=True, wide=False),
        file_bits=_file_bits(num_bits, group_size, has_zeros=True),
        group_size=group_size,
    )


def _compressed_tensors(found: dict[str, Any]) -> StoredWeights:
    groups, name = found.get("config_groups"), found.get("format")
    if name not in COMPRESSED_FORMATS:
        raise _refusal(f"The checkpoint is of compressed-tensors in the format {shown(name)}, which does not run here.")
    for field, kind in (("sparsity_config", dict), ("transform_config", dict), ("ignore", list)):
        if (value := found.get(field)) and not isinstance(value, kind):
            raise ConfigError(
                f"{field} of quantization_config is {shown(value)}, not a JSON {'list' if kind is list else 'object'}.",
                remedy="Download config.json again.",
                param=field,
            )
    sparsity = found.get("sparsity_config") or {}
    sparse = sparsity.get("format", "dense")
    if sparse != "dense":
        raise _refusal(
            f"The checkpoint is of compressed-tensors with sparse weights ({shown(sparse)}), which do not run here."
        )
    if (transforms := found.get("transform_config")) and transforms.get("config_groups"):
        raise _refusal("The checkpoint is of compressed-tensors with a transform_config, which does not run here.")
    if (
        not isinstance(groups, dict)
        or not groups
        or not all(isinstance(g, dict) and isinstance(g.get("weights"), dict) for g in groups.values())
    ):
        raise _refusal("The checkpoint is of compressed-tensors, but its config_groups say nothing of weights.")
    schemes = [group["weights"] for group in groups.values()]
    labels: list[str] = []
    bits: list[float | None] = []
    for scheme in schemes:
        kind, num_bits = scheme.get("type", "int"), scheme.get("num_bits")
        if (kind, num_bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise _refusal(
                f"The checkpoint is of compressed-tensors with {shown(kind)} weights in {shown(num_bits)} bits, which do not run here."
            )
        labels.append(f"{kind}{num_bits}")
        has_minima = not scheme.get("symmetric", True)
        # Their scales have the checkpoint's type, which is bfloat16 in most; float16 holds that only by chance.
        group_size = scheme.get("group_size") if scheme.get("strategy") == "group" else None
        if kind == "float":
            bits.append(_float8_bits(scheme.get("block_structure")))
        else:
            bits.append(_memory_bits(num_bits, group_size, has_minima=has_minima, wide=True))
    first = schemes[0]
    strategy = first.get("strategy")
    block = first.get("block_structure")
    layer_bits = None if None in bits else max(b for b in bits if b is not None)
    return StoredWeights(
        method="compressed-tensors",
        label=f"compressed-tensors {' and '.join(dict.fromkeys(labels))}",
        layer_bits=layer_bits,
        # "lm_head" or "re:.*lm_head" among those that stay dense, as in nearly every checkpoint.
        head_bits=None if any("lm_head" in str(name) for name in found.get("ignore") or ()) else layer_bits,
        file_bits=max(
            _file_bits(s["num_bits"], s.get("group_size"), has_zeros=not s.get("symmetric", True)) for s in schemes
        ),
        group_size=_group_size(first, "group_size") if strategy == "group" else None,
        block_size=_block_size(block) if strategy == "block" else None,
        # Which scheme is whose is read from the tensors, so only what all schemes have must be there.
        needed=tuple(
            suffix
            for suffix, is_needed in (
                ("weight_g_idx", all(s.get("actorder") in (True, "group", "dynamic") for s in schemes)),
                ("weight_zero_point", all(s.get("symmetric", True) is False for s in schemes)),
            )
            if is_needed
        ),
    )


def _fp8(found: dict[str, Any]) -> StoredWeights:
    if found.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _refusal(f"The checkpoint has fp8 weights of the kind {shown(found['fmt'])}, which do not run here.")
    block = found.get("weight_block_size")
    return StoredWeights(
        method="fp8",
        label="fp8",
        layer_bits=_float8_bits(block),
        file_bits=8,
        block_size=None if block is None else _block_size(block),
    )


def _memory_bits(num_bits: int, group_size: Any, *, has_minima: bool, wide: bool) -> float | None:
    """On the CPU. None for groups that do not compute as they are, and become dense."""
    if type(group_size) is int and group_size > 0 and group_size % SMALLEST_GROUP:
        return None
    return grouped_bits(num_bits, has_minima=has_minima, wide=wide)


def _float8_bits(block: Any) -> float:
    """On the CPU: a scale of 32 bits for each block of a row, or for each row, which is not counted."""
    return 8 if block is None else 8 + 32 / _block_size(block)[1]


def _file_bits(num_bits: int, group_size: Any, *, has_zeros: bool) -> float:
    """With scales of 16 bits, and zero points of as many bits as the weights."""
    size = group_size if type(group_size) is int and group_size > 0 else None
    return num_bits if size is None else num_bits + (16 + (num_bits if has_zeros else 0)) / size


def _bits(found: dict[str, Any], name: str, allowed: tuple[int, ...]) -> int:
    value = found.get(name)
    if value is None:
        raise _refusal(f"quantization_config of {shown(found.get('quant_method'))} lacks the field {name!r}.")
    if value not in allowed or type(value) is not int:
        raise _refusal(
            f"The checkpoint is quantized by {shown(found.get('quant_method'))} in {shown(value)} bits, which does not run here."
        )
    return value


def _group_size(found: dict[str, Any], name: str) -> int | None:
    value = found.get(name)
    if value is None or value == -1:
        return None
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{name} of quantization_config is {shown(value)}.", remedy="Download config.json again.", param=name
        )
    return value


def _block_size(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ConfigError(
            f"The block size of quantization_config is {shown(value)}, not two whole numbers.",
            remedy="Download config.json again.",
            param="quantization_config",
        )
    return value[0], value[1]


def _refusal(message: str) -> ConfigError:
    return ConfigError(message, remedy=_REMEDY, param="quantization_config")
