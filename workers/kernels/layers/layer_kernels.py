"""The kernels of a decoder layer as one set, chosen once when the model is built: compiled for the CPU, Triton on CUDA, or plain torch."""

import logging
from typing import Protocol

import torch

from workers.kernels.layers import layer_specification as specification
from workers.kernels.layers.native_layers import NativeLayerKernels
from workers.kernels.quantized_kv import Cache
from workers.kernels.usable import why_triton_cannot_run
from workers.native.library import NativeLibrary
from workers.native.matrices import DTYPE_NAMES

log = logging.getLogger(__name__)


class LayerKernels(Protocol):
    """Shapes and rounding: see the functions of the same names in `layer_specification`."""

    def lookup_rows(self, table: torch.Tensor, indices: torch.Tensor, *, first: int = 0) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, *, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def rotary_kv(
        self,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        *,
        kv_cache: tuple[Cache, Cache],
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor: ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...


class TorchLayerKernels:
    """See `LayerKernels`. The specifications themselves."""

    lookup_rows = staticmethod(specification.lookup_rows)
    add_rms_norm = staticmethod(specification.add_rms_norm)
    rotary_kv = staticmethod(specification.rotary_kv)
    silu_mul = staticmethod(specification.silu_mul)


class TritonLayerKernels:
    """See `LayerKernels`. One launch each."""

    lookup_rows = staticmethod(specification.lookup_rows)

    def __init__(self) -> None:
        # Imported here because Triton comes with the CUDA builds of torch only.
        from workers.kernels.layers.add_rms_norm import add_rms_norm
        from workers.kernels.layers.rotary_kv import rotary_kv
        from workers.kernels.layers.silu_mul import silu_mul

        self.add_rms_norm = add_rms_norm
        self.rotary_kv = rotary_kv
        self.silu_mul = silu_mul


TORCH_LAYER_KERNELS = TorchLayerKernels()


def select_layer_kernels(
    device: torch.device, *, dtype: torch.dtype, library: NativeLibrary | None = None
) -> LayerKernels:
    """Triton on CUDA; on the CPU those of `library`, if there is one; else the specifications. A fallback on CUDA is logged with its
    reason.
    """
    if device.type == "cpu" and library is not None and dtype in DTYPE_NAMES:
        return NativeLayerKernels(library, dtype)
    if device.type != "cuda":
        return TORCH_LAYER_KERNELS
    if obstacle := why_triton_cannot_run(device):
        log.warning("The layers run unfused, with more launches in each step, because Triton cannot run: %s.", obstacle)
        return TORCH_LAYER_KERNELS
    return TritonLayerKernels()
