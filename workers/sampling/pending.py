"""What the engine and a sampler on the device say to each other: rows to sample for, and tokens that the host has not read yet.

Knows parameters and tokens; not how a token is chosen (sampler.py, device_sampler.py), no requests, no scheduler.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from workers.protocol import SamplingParams
from workers.sampling.sampler import Sampled


class DeviceRow(NamedTuple):
    """One request to sample the next token for.

    `token_ids`: what the host knows, prompt and output in a row. `num_in_flight`: tokens of this request, 0 or 1, that earlier calls
    sampled and the host has not read yet; they come after `token_ids`. `mask`: as in SamplingRow.
    """

    request_id: str
    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    num_in_flight: int = 0
    mask: np.ndarray | None = None

    @property
    def position(self) -> int:
        """The index of the token to sample among the output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens + self.num_in_flight


class PendingTokens(Protocol):
    """The tokens of one step, still on the device."""

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_rows] int64 on the device: the next step's input, without a read by the host. 0 in a row without a possible token."""

    def read(self) -> list[Sampled]:
        """The tokens of the rows, in their order. Waits for the device, once; later calls return the same."""


def reads_history(params: SamplingParams) -> bool:
    """Whether the host must know every output token before the next one can be sampled: bad_words of several tokens compare with the
    last ones. Such a request has no tokens in flight.
    """
    return bool(params.bad_words) and any(len(word) > 1 for word in params.bad_words)
