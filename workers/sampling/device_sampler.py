"""Samples next tokens on the device of the logits, and leaves them there until they are read: the same tokens as `sampler.sample`.

A step uploads its parameters in one copy, and `read` is its only wait for the device, whatever the parameters. What penalties count is a
matrix on the device, a row for each request, kept up by the sampler itself. On CUDA the work is done by the Triton kernels of
workers.kernels.sample, elsewhere by their specification. Knows rows and parameters; no scheduler, no model.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from workers.kernels import sample_specification
from workers.kernels.sample_specification import MAX_VOCAB_SIZE, SamplingTable
from workers.kernels.usable import why_triton_cannot_run
from workers.protocol import SamplingParams
from workers.sampling.logprobs import LogprobTensors, compute_logprobs, list_logprobs
from workers.sampling.parameters import PreparedParams, count_tokens, prepare
from workers.sampling.pending import DeviceRow, PendingTokens
from workers.sampling.sampler import Sampled
from workers.sampling.slots import Slot, Slots
from workers.sampling.transfer import Download, upload

log = logging.getLogger(__name__)


class DeviceSampler:
    def __init__(
        self, *, vocab_size: int, max_num_seqs: int, device: torch.device | str, eos_token_ids: Sequence[int]
    ) -> None:
        """max_num_seqs: the most rows of a step. Allocates 4 * vocab_size * max_num_seqs bytes on the device."""
        assert vocab_size <= MAX_VOCAB_SIZE, f"a vocabulary of {vocab_size} tokens is larger than {MAX_VOCAB_SIZE}"
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._eos_token_ids = tuple(eos_token_ids)
        self._slots = Slots(max_num_seqs)
        self._counts = torch.zeros(max_num_seqs, vocab_size, dtype=torch.int32, device=self._device)
        self._adjust, self._edit, self._choose = _operators(self._device)
        if self._device.type == "cuda":
            self._compile_kernels()

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: Sequence[DeviceRow]) -> PendingTokens:
        """One token a row. logits: [len(rows), vocab_size] float32; may be overwritten. Does not wait for the device."""
        slots = self._slots_of(rows)
        with_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        step = _Step(slots, rows, self._vocab_size)
        new_slots, history_index, history = self._histories(slots, rows)
        floats, integers, masks, edit_index, edit_values, logprob_rows, new, index, counts = upload(
            [
                *(step.floats, step.integers, step.masks, step.edit_index, step.edit_values),
                *(np.array(with_logprobs, dtype=np.int64), new_slots, history_index, history),
            ],
            self._device,
        )
        if len(new_slots):
            self._counts.index_fill_(0, new, 0)
            self._counts.view(-1).index_copy_(0, index, counts)
        table = SamplingTable(
            floats, integers, masks, penalizes=step.penalizes, draws=step.draws, truncates=step.truncates
        )
        raw = logits = logits.contiguous()
        if step.penalizes or len(step.masks):
            logits = self._adjust(logits, self._counts, table)
        if len(step.edit_index):
            logits = logits.clone() if logits is raw and with_logprobs else logits
            self._edit(logits, edit_index, edit_values)
        chosen = self._choose(logits, self._counts, table)
        logprobs = None
        num_tops = [rows[i].params.logprobs or 0 for i in with_logprobs]
        if with_logprobs:
            raw, token_ids = raw.index_select(0, logprob_rows), chosen[0].index_select(0, logprob_rows)
            logprobs = compute_logprobs(raw, token_ids, max_top=max(num_tops))
        return _Pending(chosen, logprobs, with_logprobs=with_logprobs, num_tops=num_tops)

    def forget(self, request_id: str) -> None:
        """Frees what is kept of a request. Unknown ids are ignored."""
        self._slots.forget(request_id)

    def _compile_kernels(self) -> None:
        """Samples one token with everything, so that no request waits for a compiler."""
        params = SamplingParams(max_tokens=1, seed=0, top_p=0.5, presence_penalty=1.0, logit_bias={0: 1.0}, logprobs=0)
        self.sample(torch.zeros(1, self._vocab_size, device=self._device), [DeviceRow("", params, [0], 1)])
        self.forget("")

    def _slots_of(self, rows: Sequence[DeviceRow]) -> list[Slot]:
        self._slots.touch(row.request_id for row in rows)
        slots = []
        for row in rows:
            slot = self._slots.get(row.request_id)
            if slot is None or slot.prepared.params is not row.params:
                self._slots.forget(row.request_id)
                prepared = prepare(row.params, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)
                slot = self._slots.add(row.request_id, prepared)
            slots.append(slot)
        return slots

    def _histories(self, slots: Sequence[Slot], rows: Sequence[DeviceRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The slots to fill, [n] int64, and what to put into them: indices of the flat matrix, int64, and their values, int32.

        A slot counts all tokens of its request already, unless it is new or steps were taken without this sampler.
        """
        new_slots, indices, values = [], [_NO_INDEX], [np.zeros(0, dtype=np.int32)]
        for slot, row in zip(slots, rows, strict=True):
            if not slot.prepared.penalizes:
                continue
            num_tokens = len(row.token_ids) + row.num_in_flight
            if slot.num_counted != num_tokens:
                assert row.num_in_flight == 0, f"request {row.request_id!r}: the token in flight was not sampled here"
                seen, counts = count_tokens(row.token_ids, row.num_prompt_tokens, vocab_size=self._vocab_size)
                new_slots.append(slot.index)
                indices.append(slot.index * self._vocab_size + seen)
                values.append(counts)
            slot.num_counted = num_tokens + 1
        return np.array(new_slots, dtype=np.int64), np.concatenate(indices), np.concatenate(values)


class _Step:
    """The arrays of a SamplingTable and of its edits, in the units of workers.kernels.sample_specification."""

    def __init__(self, slots: Sequence[Slot], rows: Sequence[DeviceRow], vocab_size: int) -> None:
        prepared: list[PreparedParams] = [slot.prepared for slot in slots]
        self.penalizes = any(p.penalizes for p in prepared)
        self.draws = any(p.draws for p in prepared)
        self.truncates = any(p.truncates for p in prepared)
        masks = [p.mask_of(row) for p, row in zip(prepared, rows, strict=True)]
        num_mask_bytes = -(-vocab_size // 8)
        given = [mask[:num_mask_bytes] for mask in masks if mask is not None]
        self.masks = np.stack(given) if given else np.zeros((0, num_mask_bytes), dtype=np.uint8)
        mask_numbers = iter(range(len(given)))
        self.floats = np.array([p.floats for p in prepared], dtype=np.float32).T
        self.integers = np.array(
            [
                (
                    p.random_at(row.position),
                    *(p.top_p, p.min_weight, p.top_k),
                    slot.index if p.penalizes else -1,
                    -1 if mask is None else next(mask_numbers),
                )
                for slot, p, row, mask in zip(slots, prepared, rows, masks, strict=True)
            ],
            dtype=np.int64,
        ).T
        indices, values = [_NO_INDEX], [np.zeros(0, dtype=np.float32)]
        for i, (p, row) in enumerate(zip(prepared, rows, strict=True)):
            if p.edits_logits:
                token_ids, added = p.edits_of(row)
                indices.append(i * vocab_size + token_ids)
                values.append(added)
        self.edit_index, self.edit_values = np.concatenate(indices), np.concatenate(values)


class _Pending:
    """A PendingTokens. chosen: see sample_specification.choose."""

    def __init__(
        self,
        chosen: torch.Tensor,
        logprobs: LogprobTensors | None,
        *,
        with_logprobs: Sequence[int],
        num_tops: Sequence[int],
    ) -> None:
        self._token_ids = chosen[0]
        self._with_logprobs = with_logprobs
        self._num_tops = num_tops
        self._download: Download | None = Download([chosen, *(logprobs or ())])
        self._sampled: list[Sampled] = []

    @property
    def token_ids(self) -> torch.Tensor:
        return self._token_ids

    def read(self) -> list[Sampled]:
        if self._download is not None:
            chosen, *logprobs = self._download.wait()
            self._download = None
            found = list_logprobs(LogprobTensors(*logprobs), self._num_tops) if logprobs else []
            by_row = dict(zip(self._with_logprobs, found, strict=True))
            self._sampled = [
                Sampled(token_id, by_row.get(i)) if token_id >= 0 else Sampled(None, None)
                for i, token_id in enumerate(chosen[1].tolist())
            ]
        return self._sampled


_NO_INDEX = np.zeros(0, dtype=np.int64)

_Adjust = Callable[[torch.Tensor, torch.Tensor, SamplingTable], torch.Tensor]
_Edit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def _operators(device: torch.device) -> tuple[_Adjust, _Edit, _Adjust]:
    """adjust, edit and choose for tensors of this device."""
    if device.type == "cuda":
        obstacle = why_triton_cannot_run(device)
        if obstacle is None:
            from workers.kernels import sample as kernels

            return kernels.adjust, kernels.edit, kernels.choose
        log.warning(
            "Tokens are sampled with torch operators, which takes longer, because Triton cannot run: %s.", obstacle
        )
    return sample_specification.adjust, sample_specification.edit, sample_specification.choose
