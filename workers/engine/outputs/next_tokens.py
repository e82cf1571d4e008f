"""From the logits of a step to its next tokens: sampled on the host, or on the device where they stay until they are read.

Knows requests and the two samplers, whose tokens are the same. Knows no scheduler and no steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from workers.config import EngineConfig
from workers.engine.outputs.in_flight import Masks, NextTokens
from workers.engine.scheduling.request import Request
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
        # By request id. All but the mask of a row stays the same, its list of tokens too.
        self._rows: dict[str, SamplingRow] = {}

    def sample(self, logits: torch.Tensor, requests: Sequence[Request], masks: Masks) -> NextTokens:
        """logits: [len(requests), vocab_size] float32; may be overwritten."""
        known = self._rows
        rows = [known.get(r.request_id) or self._add(r) for r in requests]
        if masks:
            rows = [
                row if (mask := masks.get(r.request_id)) is None else replace(row, mask=mask)
                for r, row in zip(requests, rows, strict=True)
            ]
        sampled = self._sample_tokens(logits, rows)
        return NextTokens(requests, lambda: sampled)

    def forget(self, request_id: str) -> None:
        """Frees what is kept of a request."""
        self._rows.pop(request_id, None)

    def _add(self, request: Request) -> SamplingRow:
        row = SamplingRow(request.sampling, request.token_ids, request.num_prompt_tokens)
        return self._rows.setdefault(request.request_id, row)

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
