"""What a request reads from its prompt besides the next token: log-probabilities of the prompt's tokens, or one embedding of it.

Rank 0 only, and fed step by step with the rows that a step computes. Row p is what the model computes for the token at position p: its
hidden state, and the logits that predict the token at p + 1. Each requested row is read once: the prefix cache serves a request only up
to the first row that is still unread, and rows computed again after a preemption are skipped.

Worked example, a prompt of 10 tokens in chunks of 4, prompt_logprobs from index 3 on: rows 2 to 8 are read, from the first chunk 2 and
3, from the second 4 to 7, from the third 8. Row 9 is the sampler's.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from workers.engine.scheduling.request import PromptOutput, ScheduledRequest
from workers.protocol import GenerateRequest, TokenLogprob
from workers.sampling.logprobs import LogprobTensors, compute_logprobs, list_logprobs
from workers.sampling.transfer import Download, upload


class PromptLogprobs:
    """The list for TokenDelta.prompt_logprobs, as far as it is computed. `rows`: those still to read."""

    needs_logits = True

    def __init__(self, prompt: Sequence[int], *, start: int, num_top: int) -> None:
        self.rows = range(max(start, 1) - 1, len(prompt) - 1)
        self._logprobs: list[TokenLogprob | None] = [None] if start == 0 else []
        self._downloads: deque[Download] = deque()
        self._prompt = prompt
        self._num_top = num_top

    @property
    def logprobs(self) -> list[TokenLogprob | None]:
        """Waits for the device."""
        while self._downloads:
            self._take_download()
        return self._logprobs

    def read(self, rows: range, logits: torch.Tensor) -> None:
        """logits: [len(rows), vocab_size] float32. Does not wait for the device."""
        while self._downloads and self._downloads[0].is_there:
            self._take_download()
        token_ids = np.array(self._prompt[rows.start + 1 : rows.stop + 1], dtype=np.int64)
        (on_device,) = upload([token_ids], logits.device)
        self._downloads.append(Download(compute_logprobs(logits, on_device, max_top=self._num_top)))
        self.rows = range(rows.stop, self.rows.stop)

    def _take_download(self) -> None:
        tensors = LogprobTensors(*self._downloads.popleft().wait())
        self._logprobs += list_logprobs(tensors, [self._num_top] * len(tensors.ids))


class MeanEmbedding:
    """The mean of the prompt's last hidden states, summed in double precision. `rows`: those still to read."""

    needs_logits = False

    def __init__(self, num_prompt_tokens: int) -> None:
        self.rows = range(num_prompt_tokens)
        self._num_prompt_tokens = num_prompt_tokens
        self._sum: torch.Tensor | None = None
        self._mean: Download | None = None

    def read(self, rows: range, hidden_states: torch.Tensor) -> None:
        """hidden_states: [len(rows), hidden_size] of any type. Does not wait for the device."""
        part = hidden_states.double().sum(dim=0)
        self._sum = part if self._sum is None else self._sum + part
        self.rows = range(rows.stop, self.rows.stop)
        if not self.rows:
            self._mean = Download([self._sum / self._num_prompt_tokens])

    def to_bytes(self) -> bytes:
        """hidden_size little-endian float32 values. Waits for the device."""
        assert self._mean is not None, f"rows {self.rows} are not computed yet"
        (mean,) = self._mean.wait()
        return mean.numpy().astype("<f4").tobytes()


def make_prompt_output(message: GenerateRequest) -> PromptOutput | None:
    """None if the request asks for none, or has output already: then the first delta, elsewhere, delivered it."""
    if message.output_token_ids:
        return None
    if message.embed:
        return MeanEmbedding(len(message.prompt_token_ids))
    if message.sampling.prompt_logprobs is None:
        return None
    return PromptLogprobs(
        message.prompt_token_ids,
        start=message.sampling.prompt_logprobs_start,
        num_top=message.sampling.prompt_logprobs,
    )


class PromptReader:
    """Gives one step's rows to the requests that read them; implements workers.engine.execution.model_runner.PromptRows."""

    def __init__(self, scheduled: Sequence[ScheduledRequest]) -> None:
        # (output, rows, index of the first row among the step's tokens)
        self._pooled: list[tuple[MeanEmbedding, range, int]] = []
        # In the order of ForwardBatch.prompt_logits_indices.
        self._logits: list[tuple[PromptLogprobs, range]] = []
        begin = 0
        for s in scheduled:
            output = s.request.prompt_output
            if output is not None:
                rows = s.prompt_rows
                if rows and isinstance(output, MeanEmbedding):
                    self._pooled.append((output, rows, begin + rows.start - s.request.num_computed_tokens))
                elif rows and isinstance(output, PromptLogprobs):
                    self._logits.append((output, rows))
            begin += s.num_new_tokens

    def read_hidden_states(self, hidden_states: torch.Tensor) -> None:
        for output, rows, begin in self._pooled:
            output.read(rows, hidden_states[begin : begin + len(rows)])

    def read_logits(self, logits: torch.Tensor) -> None:
        begin = 0
        while begin < len(logits):
            output, rows = self._logits.pop(0)
            part = rows[: len(logits) - begin]
            output.read(part, logits[begin : begin + len(part)])
            begin += len(part)
            if len(part) < len(rows):  # the next slice continues it
                self._logits.insert(0, (output, rows[len(part) :]))
