"""From the logits of a step to its next tokens: sampled on the host, or on the device where they stay until they are read.

Knows requests and the two samplers, whose tokens are the same. Knows no scheduler and no steps.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from workers.config import EngineConfig
from workers.engine.in_flight import Masks, NextTokens
from workers.engine.request import Request
from workers.sampling.device_sampler import DeviceSampler
from workers.sampling.pending import DeviceRow
from workers.sampling.sampler import Sampled, SamplingRow, sample
from workers.sampling.transfer import upload

# From logits [len(rows), vocab_size] to the next tokens of each row, at least one.
SampleTokens = Callable[[torch.Tensor, Sequence[SamplingRow]], Sequence[Sequence[Sampled]]]


def no_tokens(wait: Callable[[], None]) -> NextTokens:
    """Of a step that samples nothing. wait: returns when the device has computed it."""

    def read() -> Sequence[Sequence[Sampled]]:
        wait()
        return ()

    return NextTokens((), read)


def rows_of(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows, in this order, without a wait for the device. logits: [n, vocab_size]; rows: at most n, each once."""
    if len(rows) == len(logits):
        return logits
    (index,) = upload([np.array(rows)], logits.device)
    return logits.index_select(0, index)


class HostSampling:
    """Reads the device at once. `sample_tokens`: None samples one token a row."""

    def __init__(self, config: EngineConfig, sample_tokens: SampleTokens | None = None) -> None:
        self._eos_token_ids = config.model.eos_token_ids
        self._sample_tokens = sample_tokens or self._sample_one_each

    def sample(self, logits: torch.Tensor, requests: Sequence[Request], masks: Masks) -> NextTokens:
        """logits: [len(requests), vocab_size] float32; may be overwritten."""
        rows = [SamplingRow(r.sampling, r.token_ids, r.num_prompt_tokens, masks.get(r.request_id)) for r in requests]
        sampled = self._sample_tokens(logits, rows)
        return NextTokens(requests, lambda: sampled)

    def forget(self, request_id: str) -> None:
        """Nothing is kept of a request."""

    def _sample_one_each(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[list[Sampled]]:
        return [[one] for one in sample(logits, rows, eos_token_ids=self._eos_token_ids)]


class DeviceSampling:
    """Does not wait for the device before the tokens are read."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self._sampler = DeviceSampler(
            vocab_size=config.model.vocab_size,
            max_num_seqs=config.max_num_seqs,
            device=device,
            eos_token_ids=config.model.eos_token_ids,
        )

    def sample(self, logits: torch.Tensor, requests: Sequence[Request], masks: Masks) -> NextTokens:
        """As HostSampling's. A request may have a token in flight, unless its parameters read the history."""
        rows = [
            DeviceRow(
                r.request_id, r.sampling, r.token_ids, r.num_prompt_tokens, r.num_in_flight, masks.get(r.request_id)
            )
            for r in requests
        ]
        pending = self._sampler.sample(logits, rows)
        return NextTokens(requests, lambda: [[one] for one in pending.read()], pending.token_ids)

    def forget(self, request_id: str) -> None:
        """Frees what is kept of a request."""
        self._sampler.forget(request_id)


def make_sampling(
    config: EngineConfig, device: torch.device, *, sample_tokens: SampleTokens | None = None
) -> HostSampling | DeviceSampling:
    """On the host where the model computes there too, unless steps overlap; and for another function than the sampler's own."""
    if sample_tokens is None and (config.overlaps or device.type == "cuda"):
        return DeviceSampling(config, device)
    return HostSampling(config, sample_tokens)
