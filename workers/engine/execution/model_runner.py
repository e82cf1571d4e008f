"""Runs one ForwardBatch through the model on one rank. The same on rank 0 and on followers.

Knows the model, the KV cache tensors and the batch; no requests, no sampling. Nothing here reads from the device. Decode steps on CUDA are
padded to one of a few sizes, and replay a CUDA graph where their size has one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from workers.attention.backend import AttentionMetadata, KVCaches, StepMetadata
from workers.config import EngineConfig
from workers.engine.batch import ForwardBatch, dummy_batch
from workers.engine.execution.graphs.cuda_graphs import DecodeGraphs, GraphRecorder, Step
from workers.engine.execution.graphs.decode_padding import CapturePolicy, is_decode, pad_decode, padded_size
from workers.engine.execution.step_upload import StepUpload, bytes_for
from workers.kernels.lora.rows import AdapterRows, group_rows
from workers.kv_cache import tensors as kv_cache
from workers.lora.rank_adapters import RankAdapters
from workers.lora.slots import NO_SLOT
from workers.model.mistral import MistralForCausalLM
from workers.parallel.group import TensorParallel

# Logits of this many rows of prompts exist at a time: with a vocabulary of 32,768, 16 MiB in float32, and three times that in use.
PROMPT_LOGITS_AT_ONCE = 128


class PromptRows(Protocol):
    """Reads what a step computed for prompts. The tensors are valid during the call only."""

    def read_hidden_states(self, hidden_states: torch.Tensor) -> None:
        """hidden_states: [num_tokens, hidden_size], after the final norm, in the order of the batch."""

    def read_logits(self, logits: torch.Tensor) -> None:
        """logits: [n, vocab_size] float32, the next n rows of `prompt_logits_indices`."""


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A batch on the device. The first fields have the same address in all decode steps of one size."""

    token_ids: torch.Tensor  # [num_tokens] int64, as are the other indices
    positions: torch.Tensor
    metadata: StepMetadata
    adapters: AdapterRows | None
    logits_indices: torch.Tensor
    prompt_logits_indices: torch.Tensor


class ModelRunner:
    def __init__(
        self,
        config: EngineConfig,
        model: MistralForCausalLM,
        tp: TensorParallel,
        *,
        dtype: torch.dtype,
        attention_backend: str,
        num_threads: int | None,
        pads_decodes: bool = False,
        graph_recorder: GraphRecorder | None = None,
        adapters: RankAdapters | None = None,
    ) -> None:
        """num_threads: torch threads for computing; None leaves the setting alone. graph_recorder: None runs without graphs; with one,
        `pads_decodes` must be True. adapters: None serves the base model only.
        """
        self.config = config
        self.model = model
        self.tp = tp
        self.dtype = dtype
        self.attention_backend = attention_backend
        self.adapters = adapters
        self.num_blocks = 0
        self.kv_cache: KVCaches = []
        self._policy = CapturePolicy() if graph_recorder is None else graph_recorder.policy
        self.graphs = DecodeGraphs(self._policy.sizes(config.max_num_seqs), graph_recorder)
        self._num_decodes: Counter[int] = Counter()
        self._pads_decodes = pads_decodes
        self._num_threads_to_set = num_threads
        self._graph_bytes = 0
        self._last_decode_size: int | None = None
        tokens, seqs = config.max_num_batched_tokens, config.max_num_seqs
        max_blocks = -(-config.max_model_len // config.block_size)
        self._num_groups = len(config.model.layer_groups)
        sizes = [*[tokens] * (3 + self._num_groups), *[seqs + 1] * 5, *[seqs * max_blocks] * self._num_groups]
        if adapters is not None:
            sizes += [tokens, adapters.num_slots + 1]
        self._upload = StepUpload(bytes_for(*sizes), tp.device)
        if pads_decodes:
            # A graph reads rows of this width. Uploading them whole, for contexts of any length, would take longer than widening them.
            shape = (self._num_groups, seqs, max_blocks)
            self._block_tables = list(torch.zeros(shape, dtype=torch.int32, device=tp.device))
        if graph_recorder is not None:
            # What graphs write, so that their own memory is free again at their end.
            hidden_size, vocab_size = config.model.hidden_size, config.model.vocab_size
            self._hidden_states = torch.zeros((seqs, hidden_size), dtype=dtype, device=tp.device)
            self._logits = torch.zeros((seqs, vocab_size), device=tp.device) if tp.rank == 0 else None

    def allocate_kv_cache(self) -> int:
        """Sizes and allocates the KV cache; every rank gets the smallest size that any of them can hold. Returns the usable blocks."""
        if self.tp.device.type == "cuda" and self.config.num_kv_blocks is None:
            self._profile()
        fitting = kv_cache.num_blocks_that_fit(self.config, self.tp.device, reserved_bytes=self._graph_bytes)
        self.num_blocks = self.tp.min(fitting)
        self.kv_cache = kv_cache.allocate(self.config, self.num_blocks, self.dtype, self.tp.device)
        return self.num_blocks

    @torch.inference_mode()
    def execute(
        self, batch: ForwardBatch, prompts: PromptRows | None = None, *, sampled: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Logits [num_sampling_seqs, vocab_size] in float32 on rank 0, None elsewhere.

        prompts and sampled are for rank 0 only. sampled: the token ids to which `batch.unread_rows` refers, int64 on the device.
        """
        if self._num_threads_to_set is not None:
            # Set it here, on the thread that computes: OpenMP keeps a pool per calling thread, and once all pools together have
            # more threads than the machine has cores, its barriers sleep instead of spinning (a step of the demo model: 8.8 ms,
            # not 4.0 ms).
            torch.set_num_threads(self._num_threads_to_set)
            self._num_threads_to_set = None
        if self._pads_decodes and is_decode(batch):
            return self._execute_decode(batch, prompts, sampled)
        self._last_decode_size = None
        inputs = self._to_device(batch, sampled)
        hidden_states = self._forward(inputs)
        if prompts is not None:
            prompts.read_hidden_states(hidden_states)
        if len(batch.prompt_logits_indices):
            for indices in inputs.prompt_logits_indices.split(PROMPT_LOGITS_AT_ONCE):
                prompt_logits = self.model.compute_logits(hidden_states[indices])  # every rank takes part
                if prompts is not None and prompt_logits is not None:
                    prompts.read_logits(prompt_logits)
        if not len(batch.logits_indices):
            return None
        return self.model.compute_logits(hidden_states[inputs.logits_indices])

    def size_to_capture(self, *, is_idle: bool) -> int | None:
        """The size of decode step whose CUDA graph should be captured now, on all ranks; None if there is none. While the engine has work
        that is the size of the last step, so that no step waits for a graph that nobody needs yet.
        """
        if is_idle:
            return self.graphs.next_size(None) if self._policy.when_idle else None
        size = self._last_decode_size
        if size is None or self._num_decodes[size] < self._policy.num_steps_before:
            return None
        return self.graphs.next_size(size)

    def capture(self, size: int) -> None:
        """Captures decode steps of `size` sequences, on every rank between the same two steps."""
        self.graphs.capture(size, self._decode_step(size), agree=lambda ok: bool(self.tp.min(int(ok))))

    def put_adapter(self, slot: int, key: tuple[int, int]) -> bool:
        """Puts an adapter into a slot, on every rank between the same two steps. False if a rank does not have it: the slot is empty. With
        NO_SLOT, forgets it.
        """
        assert self.adapters is not None, "no adapter is put where there are none"
        if slot == NO_SLOT:
            self.adapters.forget(key)
            return True
        everywhere = bool(self.tp.min(int(self.adapters.put(slot, key))))
        if not everywhere:
            self.adapters.clear(slot)
        return everywhere

    def mark(self) -> Callable[[], None]:
        """A function that waits until the device has computed what was begun before this call, and for nothing that begins later."""
        if self.tp.device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def synchronize(self) -> None:
        """Waits until the device has computed what `execute` began. Returns at once on the CPU."""
        if self.tp.device.type == "cuda":
            torch.cuda.synchronize(self.tp.device)

    def _execute_decode(
        self, batch: ForwardBatch, prompts: PromptRows | None, sampled: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`execute` for one token of each sequence. Logits are computed for all of them, and for the rows that pad the batch."""
        num_seqs = len(batch.query_lens)
        size = self._last_decode_size = padded_size(num_seqs, self.graphs.sizes)
        self._num_decodes[size] += 1
        inputs = self._to_device(pad_decode(batch, size), sampled)
        if self.graphs.replay(size):
            hidden_states, logits = self._hidden_states, self._logits
        else:
            hidden_states, logits = self._compute(inputs)
        if prompts is not None:
            prompts.read_hidden_states(hidden_states[:num_seqs])
        if logits is None or not len(batch.logits_indices):
            return None
        all_sample = len(batch.logits_indices) == num_seqs
        return logits[:num_seqs] if all_sample else logits[inputs.logits_indices]

    def _compute(self, inputs: _Inputs, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_states = self._forward(inputs)
        return hidden_states, self.model.compute_logits(hidden_states, out)

    def _forward(self, inputs: _Inputs) -> torch.Tensor:
        return self.model(inputs.token_ids, inputs.positions, self.kv_cache, inputs.metadata, inputs.adapters)

    def _decode_step(self, size: int) -> Step:
        """What the graph of a size repeats, with inputs that touch the null block only."""
        inputs = self._to_device(pad_decode(self._dummy_batch(1, 1), size), None)

        @torch.inference_mode()
        def step() -> None:
            out = None if self._logits is None else self._logits[:size]
            hidden_states, logits = self._compute(inputs, out)
            self._hidden_states[:size].copy_(hidden_states)
            if out is not None and logits is not None and logits.data_ptr() != out.data_ptr():
                out.copy_(logits)

        return step

    def _to_device(self, batch: ForwardBatch, sampled: torch.Tensor | None) -> _Inputs:
        cu_seqlens_q = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(batch.query_lens, dtype=np.int32)])
        (unread,) = np.nonzero(batch.unread_rows >= 0)
        tensors = self._upload.upload(
            [
                (batch.token_ids, torch.int64),
                (batch.positions, torch.int64),
                *((slots, torch.int64) for slots in batch.slot_mapping),
                (batch.seq_lens, torch.int32),
                (cu_seqlens_q, torch.int32),
                *((rows, torch.int32) for rows in self._adapter_rows(batch)),
                # From here on, decode steps of one size may differ in their shapes.
                (batch.logits_indices, torch.int64),
                (batch.prompt_logits_indices, torch.int64),
                *((table, torch.int32) for table in batch.block_table),
                (unread, torch.int64),
                (batch.unread_rows[unread], torch.int64),
            ]
        )
        n = self._num_groups
        (token_ids, positions), slots, rest = tensors[:2], tensors[2 : 2 + n], tensors[2 + n :]
        (seq_lens, cu_seqlens), rest = rest[:2], rest[2:]
        adapters = None
        if self.adapters is not None:
            adapters, rest = AdapterRows(*rest[:2]), rest[2:]
        logits_indices, prompt_logits_indices = rest[:2]
        tables, indices = rest[2 : 2 + n], rest[2 + n :]
        if len(unread):
            self._insert_sampled(token_ids, sampled, unread=(unread, batch.unread_rows[unread]), indices=indices)
        max_seq_len = int(batch.seq_lens.max())
        if self._pads_decodes and is_decode(batch):
            # What a graph takes for given must be the same without it.
            num_seqs, width = tables[0].shape
            for table, wide in zip(tables, self._block_tables, strict=True):
                wide[:num_seqs, :width].copy_(table)
            tables, max_seq_len = [wide[:num_seqs] for wide in self._block_tables], self.config.max_model_len
        query_lens, context_lens = batch.query_lens.tolist(), batch.seq_lens.tolist()
        metadata = [
            AttentionMetadata(
                slot_mapping=slot_mapping,
                block_table=table,
                seq_lens=seq_lens,
                cu_seqlens_q=cu_seqlens,
                query_lens=query_lens,
                context_lens=context_lens,
                max_query_len=max(query_lens),
                max_seq_len=max_seq_len,
            )
            for slot_mapping, table in zip(slots, tables, strict=True)
        ]
        return _Inputs(token_ids, positions, metadata, adapters, logits_indices, prompt_logits_indices)

    def _adapter_rows(self, batch: ForwardBatch) -> tuple[np.ndarray, ...]:
        if self.adapters is None:
            return ()
        return group_rows(np.repeat(batch.adapter_slots, batch.query_lens), self.adapters.num_slots)

    def _insert_sampled(
        self,
        token_ids: torch.Tensor,
        sampled: torch.Tensor | None,
        *,
        unread: tuple[np.ndarray, np.ndarray],
        indices: Sequence[torch.Tensor],
    ) -> None:
        """Writes tokens that the host has not read into `token_ids`, on every rank. unread: the indices of these tokens, and their rows of
        `sampled`; indices: both on the device.
        """
        # Only rank 0 has sampled.
        if sampled is not None:
            tokens, rows = unread
            n = len(tokens)
            if rows[-1] == tokens[-1] == n - 1 and (rows == tokens).all():
                # The usual step, in which all go on that went on in the last one.
                token_ids[:n] = sampled[:n]
            else:
                token_ids.index_copy_(0, indices[0], sampled.index_select(0, indices[1]))
        self.tp.broadcast_tensor(token_ids)

    def _dummy_batch(self, num_tokens: int, max_tokens_per_seq: int, **more: int) -> ForwardBatch:
        block_size = self.config.block_size
        return dummy_batch(num_tokens, max_tokens_per_seq, block_size, num_groups=self._num_groups, **more)

    def _profile(self) -> None:
        """Runs the steps that need the most memory with a one-block cache, so that peak memory is known before the real cache is sized, and
        takes the memory of the graphs to come.
        """
        config = self.config
        self.kv_cache = kv_cache.allocate(config, 1, self.dtype, self.tp.device)
        self._graph_bytes = self.graphs.reserve(self._decode_step)
        torch.cuda.reset_peak_memory_stats(self.tp.device)
        longest = min(config.max_model_len, config.max_num_batched_tokens)
        # As many sequences as may sample in one step: the logits are the largest activation.
        longest = min(longest, max(1, config.max_num_batched_tokens // config.max_num_seqs))
        num_tokens = min(config.max_num_batched_tokens, config.max_num_seqs * longest)
        num_prompt_logits = min(num_tokens, PROMPT_LOGITS_AT_ONCE)
        batch = self._dummy_batch(num_tokens, longest, num_prompt_logits=num_prompt_logits)
        self.execute(batch, _LikePromptLogprobs())
        if self.attention_backend == "triton":
            # Imported here because Triton comes with the CUDA builds of torch only.
            from workers.attention.triton_paged import widest_split

            num_heads = config.model.num_attention_heads // self.tp.size
            num_tokens, seq_len = widest_split(num_tokens, num_heads=num_heads, head_dim=config.model.head_dim)
            num_computed_tokens = max(0, min(seq_len, config.max_model_len) - longest)
            self.execute(self._dummy_batch(num_tokens, longest, num_computed_tokens=num_computed_tokens))
        torch.cuda.synchronize(self.tp.device)
        self.kv_cache = []
        # Pieces that a KV cache does not fit into.
        torch.cuda.empty_cache()


class _LikePromptLogprobs:
    """Needs as much memory as reading a slice of a prompt's log-probabilities, and as an embedding of the longest chunk."""

    def read_hidden_states(self, hidden_states: torch.Tensor) -> None:
        hidden_states.double()

    def read_logits(self, logits: torch.Tensor) -> None:
        logits.log_softmax(dim=-1).topk(1)
