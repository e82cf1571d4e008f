"""Samples next tokens on the device of the logits, and leaves them there until they are read: the same tokens as `sampler.sample`.

A step uploads its parameters in one copy, and `read` is its only wait for the device, whatever the parameters. What penalties count is a
matrix on the device, a row for each request, kept up by the sampler itself. On CUDA the work is done by the Triton kernels of
workers.kernels, elsewhere by their specification. Knows rows and parameters; no scheduler, no model.
"""

from collections.abc import Sequence

import numpy as np
import torch

from workers.kernels.sampling.sample_specification import MAX_VOCAB_SIZE, SamplingTable
from workers.kernels.sampling.sampling_kernels import SamplingKernels, select_sampling_kernels
from workers.protocol import SamplingParams
from workers.sampling.logprobs import LogprobTensors, compute_logprobs, list_logprobs
from workers.sampling.parameters import Edits, count_tokens, prepare
from workers.sampling.pending import DeviceRow, PendingTokens
from workers.sampling.sampler import Sampled
from workers.sampling.slots import Columns, Slot, Slots
from workers.sampling.transfer import Download, upload


class DeviceSampler:
    def __init__(
        self,
        *,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device | str,
        eos_token_ids: Sequence[int],
        kernels: SamplingKernels | None = None,
    ) -> None:
        """max_num_seqs: the most rows of a step. kernels: None takes those of the device. Allocates 4 * vocab_size * max_num_seqs bytes on
        the device.
        """
        assert vocab_size <= MAX_VOCAB_SIZE, f"a vocabulary of {vocab_size} tokens is larger than {MAX_VOCAB_SIZE}"
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._eos_token_ids = tuple(eos_token_ids)
        self._slots = Slots(max_num_seqs)
        self._no_masks = torch.zeros(0, -(-vocab_size // 8), dtype=torch.uint8, device=self._device)
        self._counts = torch.zeros(max_num_seqs, vocab_size, dtype=torch.int32, device=self._device)
        self._kernels = kernels or select_sampling_kernels(self._device)
        if self._device.type == "cuda":
            self._compile_kernels()

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: Sequence[DeviceRow]) -> PendingTokens:
        """One token a row. logits: [len(rows), vocab_size] float32; may be overwritten. Does not wait for the device."""
        slots = self._slots_of(rows)
        columns = self._slots.columns(slots)
        with_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if columns.draws:
            columns.integers[0] = [slot.prepared.random_at(row.position) for slot, row in zip(slots, rows, strict=True)]
        arrays = {"floats": columns.floats, "integers": columns.integers}
        if masks := self._masks(slots, rows, columns):
            arrays["masks"] = np.stack(masks)
        if columns.edits_logits:
            arrays["edit_index"], arrays["edit_values"] = self._edits(slots, rows)
        if columns.penalizes:
            arrays |= self._histories(slots, rows)
        if with_logprobs:
            arrays["logprob_rows"] = np.array(with_logprobs)
        on_device = dict(zip(arrays, upload([*arrays.values()], self._device), strict=True))
        if "new_slots" in arrays:
            self._counts.index_fill_(0, on_device["new_slots"], 0)
            self._counts.view(-1).index_copy_(0, on_device["count_index"], on_device["counts"])
        table = SamplingTable(
            on_device["floats"],
            on_device["integers"],
            on_device.get("masks", self._no_masks),
            penalizes=columns.penalizes,
            draws=columns.draws,
            truncates=columns.truncates,
        )
        raw = logits = logits.contiguous()
        if columns.penalizes or masks:
            logits = self._kernels.adjust(logits, self._counts, table)
        if columns.edits_logits and len(arrays["edit_index"]):
            logits = logits.clone() if logits is raw and with_logprobs else logits
            self._kernels.edit(logits, on_device["edit_index"], on_device["edit_values"])
        chosen = self._kernels.choose(logits, self._counts, table)
        logprobs = None
        num_tops = [rows[i].params.logprobs or 0 for i in with_logprobs]
        if with_logprobs:
            logprobs = compute_logprobs(
                raw, chosen[0], rows=on_device["logprob_rows"], max_top=max(num_tops), kernels=self._kernels
            )
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
        known = self._slots.touch([row.request_id for row in rows])
        return [
            slot if slot is not None and slot.prepared.params is row.params else self._new_slot(row)
            for slot, row in zip(known, rows, strict=True)
        ]

    def _new_slot(self, row: DeviceRow) -> Slot:
        self._slots.forget(row.request_id)
        prepared = prepare(row.params, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)
        return self._slots.add(row.request_id, prepared)

    def _masks(self, slots: Sequence[Slot], rows: Sequence[DeviceRow], columns: Columns) -> list[np.ndarray]:
        """Those of SamplingTable.masks. Writes their numbers into `columns`."""
        masks: list[np.ndarray] = []
        if columns.has_mask or any(row.mask is not None for row in rows):
            for i, (slot, row) in enumerate(zip(slots, rows, strict=True)):
                mask = slot.prepared.mask_of(row)
                if mask is not None:
                    columns.integers[5, i] = len(masks)
                    masks.append(mask[: self._no_masks.shape[1]])
        return masks

    def _edits(self, slots: Sequence[Slot], rows: Sequence[DeviceRow]) -> Edits:
        """Of all rows: indices of the flat logits, and what to add."""
        found = [slot.prepared.edits_of(row) for slot, row in zip(slots, rows, strict=True)]
        indices = [i * self._vocab_size + token_ids for i, (token_ids, _) in enumerate(found)]
        return np.concatenate(indices), np.concatenate([values for _, values in found])

    def _histories(self, slots: Sequence[Slot], rows: Sequence[DeviceRow]) -> dict[str, np.ndarray]:
        """The slots to fill, [n] int64, and what to put into them: indices of the flat matrix, int64, and their counts, int32. Empty if
        there are none: a slot counts all tokens of its request already, unless it is new or steps were taken without this sampler.
        """
        new_slots, indices, values = [], [], []
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
        if not new_slots:
            return {}
        return {
            "new_slots": np.array(new_slots),
            "count_index": np.concatenate(indices),
            "counts": np.concatenate(values),
        }


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
