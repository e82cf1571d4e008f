"""What sampling on a device runs, as one set, chosen once for a device: plain torch, or Triton on CUDA."""

import functools
import logging
from typing import Protocol

import torch

from workers.kernels.sampling import sample_specification as specification
from workers.kernels.sampling.sample_specification import SamplingTable
from workers.kernels.usable import why_triton_cannot_run

log = logging.getLogger(__name__)


class SamplingKernels(Protocol):
    """Shapes and units: see the functions of the same names in `sample_specification`. Logits are contiguous."""

    def adjust(self, logits: torch.Tensor, counts: torch.Tensor, table: SamplingTable) -> torch.Tensor: ...

    def edit(self, logits: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None: ...

    def choose(self, logits: torch.Tensor, counts: torch.Tensor, table: SamplingTable) -> torch.Tensor: ...

    def find_logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, *, rows: torch.Tensor | None = None, max_top: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class TorchSamplingKernels:
    """See `SamplingKernels`. The specifications themselves."""

    adjust = staticmethod(specification.adjust)
    edit = staticmethod(specification.edit)
    choose = staticmethod(specification.choose)
    find_logprobs = staticmethod(specification.find_logprobs)


class TritonSamplingKernels:
    """See `SamplingKernels`. One launch each."""

    def __init__(self) -> None:
        # Imported here because Triton comes with the CUDA builds of torch only.
        from workers.kernels.sampling.logprobs import find_logprobs
        from workers.kernels.sampling.sample import adjust, choose, edit

        self.adjust = adjust
        self.edit = edit
        self.choose = choose
        self.find_logprobs = find_logprobs


@functools.cache
def select_sampling_kernels(device: torch.device) -> SamplingKernels:
    """Triton on CUDA, else the specifications; a fallback on CUDA is logged with its reason."""
    if device.type != "cuda":
        return TorchSamplingKernels()
    if obstacle := why_triton_cannot_run(device):
        log.warning(
            "Tokens are sampled with torch operators, which takes longer, because Triton cannot run: %s.", obstacle
        )
        return TorchSamplingKernels()
    return TritonSamplingKernels()
