"""Finds the quantised matrices among a checkpoint's tensors, each several tensors of one module, and chooses the reader of each.

Knows how the formats name tensors; the readers know the rest. Knows no files.
"""

import logging
import re
from collections.abc import Mapping
from typing import TypeVar

from workers.errors import CheckpointError
from workers.quant.forms import Form
from workers.quant.method import WeightSource
from workers.stored_weights import StoredWeights
from workers.weights.quantized.awq import AwqPacking, check_awq
from workers.weights.quantized.compressed import CompressedPacking, check_compressed
from workers.weights.quantized.float8 import INPUT_SCALES, Float8Matrix, check_float8
from workers.weights.quantized.gptq import GptqPacking, check_gptq
from workers.weights.quantized.grouped import GroupedMatrix
from workers.weights.quantized.header import TensorHeader
from workers.weights.quantized.source import StoredTensor

log = logging.getLogger(__name__)

# Of a module's tensors, those that make it a quantised matrix.
_OF_GPTQ_OR_AWQ = ("qweight", "qzeros", "scales", "g_idx")
_OF_OTHERS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "weight_global_scale",
)
# Of rounded inputs, and of keys and values: this engine keeps these in its dtype, which is nearer to the original. Products of 8-bit floats
# have a use for the scales of their inputs.
_WITHOUT_EFFECT = re.compile(
    r".*\.(input_scale|input_zero_point|input_global_scale|activation_scale|output_scale|[qkv]_scale|[qkv]_zero_point)"
)
T = TypeVar("T", bound=TensorHeader)


def find_matrices(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, dict[str, T]]]:
    """The tensors outside of quantised matrices, by name, and {module: {suffix: tensor}} of those that are.

    Tensors without an effect are in neither.
    """
    modules: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in (*_OF_GPTQ_OR_AWQ, *_OF_OTHERS) or (suffix == "weight" and tensor.dtype in ("I8", "F8_E4M3")):
            modules.setdefault(module, {})[suffix] = tensor
    others = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in modules.get(module, ()):
            continue
        if suffix in INPUT_SCALES and _is_float8(tensors.get(f"{module}.weight")):
            modules[module][suffix] = tensor
            continue
        if _WITHOUT_EFFECT.fullmatch(name):
            continue
        if suffix == "weight" and module in modules:
            modules[module][suffix] = tensor
        else:
            others[name] = tensor
    return others, modules


def check_matrices(
    modules: Mapping[str, Mapping[str, TensorHeader]], stored: StoredWeights, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Form]:
    """{"MODULE.weight": its form}. shapes: {tensor: shape} of the dense model. Raises CheckpointError for a damaged matrix."""
    forms: dict[str, Form] = {}
    for module, tensors in modules.items():
        shape = _shape(module, tensors, shapes)
        kind = _kind(module, tensors, stored)
        if kind == "gptq":
            forms[f"{module}.weight"] = check_gptq(module, tensors, shape)
        elif kind == "awq":
            forms[f"{module}.weight"] = check_awq(module, tensors, shape)
        elif kind == "float8":
            forms[f"{module}.weight"] = check_float8(module, tensors, shape, block_size=stored.block_size)
        else:
            forms[f"{module}.weight"] = check_compressed(module, tensors, shape)
    return forms


def open_matrices(
    tensors: Mapping[str, StoredTensor], stored: StoredWeights, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, WeightSource]:
    """Every tensor of a dense model, quantised ones under the name MODULE.weight. Raises CheckpointError for a damaged matrix."""
    others, modules = find_matrices(tensors)
    sources: dict[str, WeightSource] = {**others}
    for module, parts in modules.items():
        shape = _shape(module, parts, shapes)
        kind = _kind(module, parts, stored)
        if kind == "gptq":
            packing = GptqPacking(module, parts, shape, zero_offset=1 if stored.method == "gptq" else 0)
            sources[f"{module}.weight"] = GroupedMatrix(packing)
        elif kind == "awq":
            sources[f"{module}.weight"] = GroupedMatrix(AwqPacking(module, parts, shape))
        elif kind == "float8":
            sources[f"{module}.weight"] = Float8Matrix(module, parts, shape, block_size=stored.block_size)
        else:
            sources[f"{module}.weight"] = GroupedMatrix(CompressedPacking(module, parts, shape))
    kept = {f"{module}.{suffix}" for module, parts in modules.items() for suffix in parts}
    if dropped := sum(_WITHOUT_EFFECT.fullmatch(name) is not None for name in tensors.keys() - kept):
        log.info(
            "%d tensors with scales of inputs, keys or values have no effect: they are computed in the engine's own type.",
            dropped,
        )
    return sources


def _is_float8(weight: TensorHeader | None) -> bool:
    return weight is not None and weight.dtype == "F8_E4M3"


def _kind(module: str, tensors: Mapping[str, TensorHeader], stored: StoredWeights) -> str:
    """ "gptq", "awq", "compressed" or "float8". Raises CheckpointError for tensors of another format than the configuration says, and for
    one that it says and that is missing.
    """
    is_words = any(suffix in tensors for suffix in _OF_GPTQ_OR_AWQ)
    if lacking := next((suffix for suffix in stored.needed if suffix not in tensors), None):
        raise CheckpointError(
            f"The quantized matrix {module} lacks its tensor {module}.{lacking}, which quantization_config says that it has.",
            remedy="Download the checkpoint again, all files of one revision.",
        )
    if is_words and stored.method in ("gptq", "gptq_v2", "awq"):
        return "awq" if stored.method == "awq" else "gptq"
    weight = tensors.get("weight")
    if not is_words and stored.method in ("compressed-tensors", "fp8") and "weight_global_scale" not in tensors:
        is_float = weight is not None and weight.dtype not in ("I8", "U8")
        return "float8" if is_float or stored.method == "fp8" else "compressed"
    example = next(iter(tensors.values()))
    raise CheckpointError(
        f"{example.name} is of another format than {stored.label}, which quantization_config says.",
        remedy="Use the configuration file that belongs to the weights.",
    )


def _shape(module: str, tensors: Mapping[str, TensorHeader], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    shape = shapes.get(f"{module}.weight")
    if shape is None or len(shape) != 2:
        example = next(iter(tensors.values()))
        raise CheckpointError(
            f"{example.name} has no place in a model of this kind.",
            remedy="Use a checkpoint of a plain Mistral or Llama model.",
        )
    return shape[0], shape[1]
