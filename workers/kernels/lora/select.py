"""Chooses LoRA's kernels, once and when the model is built: compiled for the CPU, Triton on CUDA, or plain torch."""

import logging
from collections.abc import Sequence

import torch

from workers.kernels.lora.native_table import NativeLoraTable
from workers.kernels.lora.table import LoraTable, NewLoraTable, TorchLoraTable
from workers.kernels.usable import why_triton_cannot_run
from workers.native.library import NativeLibrary
from workers.native.matrices import DTYPE_NAMES

log = logging.getLogger(__name__)


def select_lora(
    device: torch.device, *, dtype: torch.dtype, num_slots: int, max_rank: int, library: NativeLibrary | None = None
) -> NewLoraTable:
    """max_rank: of any adapter. A fallback on CUDA is logged with its reason."""
    if device.type == "cpu" and library is not None and dtype in DTYPE_NAMES:

        def native(in_features: int, out_sizes: Sequence[int]) -> LoraTable:
            return NativeLoraTable(in_features, out_sizes, num_slots=num_slots, dtype=dtype, library=library)

        return native
    obstacle = why_triton_cannot_run(device) if device.type == "cuda" else None
    if device.type == "cuda" and obstacle is None:
        # Imported here because Triton comes with the CUDA builds of torch only.
        from workers.kernels.lora.triton_table import TritonLoraTable

        def in_triton(in_features: int, out_sizes: Sequence[int]) -> LoraTable:
            return TritonLoraTable(
                in_features, out_sizes, num_slots=num_slots, max_rank=max_rank, dtype=dtype, device=device
            )

        return in_triton
    if obstacle is not None:
        log.warning("Adapters are computed row by row, slowly, because Triton cannot run: %s.", obstacle)

    def in_torch(in_features: int, out_sizes: Sequence[int]) -> LoraTable:
        return TorchLoraTable(in_features, out_sizes, num_slots=num_slots, dtype=dtype, device=device)

    return in_torch
