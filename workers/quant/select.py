"""Chooses the method of each weight matrix, by the form that the checkpoint has and by the device.

Knows the methods' limits, not their arithmetic.
"""

import logging
from collections.abc import Mapping

import torch

from workers.config import Quantization
from workers.errors import ConfigError
from workers.kernels.usable import why_triton_cannot_run
from workers.native.library import NativeLibrary
from workers.quant.at_load import AtLoadMethod
from workers.quant.dense import DENSE, DenseMethod
from workers.quant.forms import Form
from workers.quant.grouped import GroupedMethod
from workers.quant.method import WeightMethod, WeightMethods
from workers.quant.pack_cpu import cpu_pack
from workers.quant.pack_dense import pack_as_dense
from workers.quant.stored import Pack, StoredMethod

log = logging.getLogger(__name__)


def select_methods(
    device: torch.device,
    *,
    forms: Mapping[str, Form],
    shards: Mapping[str, Mapping[str, str]],
    quantization: Quantization | None = None,
    library: NativeLibrary | None = None,
    deterministic: bool = False,
) -> WeightMethods:
    """forms: {tensor in the checkpoint: its form}, without those that are dense if you like; a tied head has the embedding's.
    shards: {last name of a module: {last name of a module in the checkpoint: its shard}}. The rest: see `select_method`.
    """
    plain = select_method(device, quantization=quantization, library=library, deterministic=deterministic)
    stored = StoredMethod(cpu_pack(library) if device.type == "cpu" else _device_pack(device, plain, deterministic))
    if device.type == "cuda" and any(forms.values()) and (obstacle := why_triton_cannot_run(device)):
        log.warning(
            "Quantized weights are kept and computed dense, because their products run in Triton, and %s.", obstacle
        )

    def method_of(name: str) -> WeightMethod:
        prefix, _, last = name.rpartition(".")
        names = [f"{prefix}.{shard}" for shard in shards.get(last, ())] or [name]
        return stored if any(forms.get(f"{one}.weight") is not None for one in names) else plain

    return method_of


def select_method(
    device: torch.device,
    *,
    quantization: Quantization | None = None,
    library: NativeLibrary | None = None,
    deterministic: bool = False,
) -> WeightMethod:
    """On the CPU the compiled kernels where there are any (`library`), else torch's products. On CUDA the library's product, the
    deterministic one, or those of quantised weights.

    Raises ConfigError where Triton cannot run, which all but the library's product need.
    """
    if device.type == "cpu":
        dense = DenseMethod(library=library)
        if quantization is None:
            return dense
        if quantization == "fp8":
            return AtLoadMethod(quantization, cpu_pack(library), device=device, tied=dense)
        return GroupedMethod(8 if quantization == "int8" else 4, library=library, tied=dense)
    if device.type != "cuda" or not (deterministic or quantization):
        return DENSE
    if obstacle := why_triton_cannot_run(device):
        option = f"--quantization {quantization}" if quantization else "--deterministic"
        raise ConfigError(
            f"{option} cannot work: its products run in Triton, and {obstacle}.",
            remedy="Leave it out.",
            param=option.split()[0],
        )
    dense = _dense_on_gpu(deterministic)
    if quantization is None:
        return dense
    return AtLoadMethod(quantization, _device_pack(device, dense, deterministic), device=device, tied=dense)


def _dense_on_gpu(deterministic: bool) -> DenseMethod:
    if not deterministic:
        return DENSE
    # Imported here because Triton comes with the CUDA builds of torch only.
    from workers.kernels.layers.matmul import matmul

    return DenseMethod(matmul)


def _device_pack(device: torch.device, dense: WeightMethod, deterministic: bool) -> Pack:
    """dense: computes what has no product of its form."""
    if why_triton_cannot_run(device) is not None:
        return pack_as_dense(dense)
    # Imported here because Triton comes with the CUDA builds of torch only.
    from workers.quant.pack_cuda import cuda_pack

    return cuda_pack(dense, capability=torch.cuda.get_device_capability(device), deterministic=deterministic)
