"""Which kernels sample: Triton's on CUDA, the specifications elsewhere and where Triton cannot run."""

import logging

import torch

from workers.kernels.sampling import sampling_kernels
from workers.kernels.sampling.sampling_kernels import TorchSamplingKernels, TritonSamplingKernels

# Without what it keeps of other devices.
select = sampling_kernels.select_sampling_kernels.__wrapped__


def test_the_specifications_sample_on_the_cpu(caplog):
    assert isinstance(select(torch.device("cpu")), TorchSamplingKernels)
    assert not caplog.records


def test_a_fallback_on_cuda_says_why(monkeypatch, caplog):
    obstacle = None
    monkeypatch.setattr(sampling_kernels, "why_triton_cannot_run", lambda device: obstacle)
    assert isinstance(select(torch.device("cuda")), TritonSamplingKernels)
    obstacle = "it is not installed"
    with caplog.at_level(logging.WARNING):
        assert isinstance(select(torch.device("cuda")), TorchSamplingKernels)
    (record,) = caplog.records
    assert record.getMessage().endswith("because Triton cannot run: it is not installed.")
