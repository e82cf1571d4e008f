"""Chooses the form of the weight matrices for a device. Knows the methods' limits, not their arithmetic."""

import torch

from workers.config import Quantization
from workers.errors import ConfigError
from workers.kernels.usable import why_triton_cannot_run
from workers.native.library import NativeLibrary
from workers.quant.dense import DENSE, DenseMethod
from workers.quant.grouped import GroupedMethod
from workers.quant.method import WeightMethod


def select_method(
    device: torch.device,
    *,
    quantization: Quantization | None = None,
    library: NativeLibrary | None = None,
    deterministic: bool = False,
) -> WeightMethod:
    """On the CPU the compiled kernels where there are any (`library`), else torch's products. On CUDA the library's product, or the
    deterministic one.

    Raises ConfigError where Triton cannot run, which the deterministic product needs.
    """
    if device.type == "cpu":
        dense = DenseMethod(library=library)
        if quantization is None:
            return dense
        return GroupedMethod(8 if quantization == "int8" else 4, library=library, tied=dense)
    if not deterministic or device.type != "cuda":
        return DENSE
    if obstacle := why_triton_cannot_run(device):
        raise ConfigError(
            f"--deterministic cannot work: its products run in Triton, and {obstacle}.",
            remedy="Leave it out.",
            param="--deterministic",
        )
    # Imported here because Triton comes with the CUDA builds of torch only.
    from workers.kernels.matmul import matmul

    return DenseMethod(matmul)
