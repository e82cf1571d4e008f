"""Runs one ForwardBatch through the model on one rank. The same on rank 0 and on followers.

Knows the model, the KV cache tensors and the batch; no requests, no sampling. Input tensors live in static buffers that
are overwritten each step, and nothing reads from the device before the model has finished, so a step can be captured in a CUDA graph.
"""

from typing import Protocol

import numpy as np
import torch

from workers.attention.backend import AttentionMetadata, KVCaches
from workers.config import EngineConfig
from workers.engine.batch import ForwardBatch, dummy_batch
from workers.kv_cache import tensors as kv_cache
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


class _Buffer:
    """A device tensor of fixed address and capacity; `fill` returns a view of the filled part."""

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device_tensor = torch.zeros(capacity, dtype=dtype, device=device)
        self.host_tensor = torch.zeros(capacity, dtype=dtype, pin_memory=True) if device.type == "cuda" else None

    def fill(self, values: np.ndarray) -> torch.Tensor:
        n = values.size
        source = torch.from_numpy(np.ascontiguousarray(values).reshape(-1))
        if self.host_tensor is None:
            self.device_tensor[:n] = source
        else:
            self.host_tensor[:n] = source
            self.device_tensor[:n].copy_(self.host_tensor[:n], non_blocking=True)
        return self.device_tensor[:n]


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
    ) -> None:
        """num_threads: torch threads for computing; None leaves the setting alone."""
        self.config = config
        self.model = model
        self.tp = tp
        self.dtype = dtype
        self.attention_backend = attention_backend
        self._num_threads_to_set = num_threads
        self._inputs_copied = torch.cuda.Event() if tp.device.type == "cuda" else None
        self.num_blocks = 0
        self.kv_cache: KVCaches = []
        tokens, seqs = config.max_num_batched_tokens, config.max_num_seqs
        max_blocks = -(-config.max_model_len // config.block_size)

        def buffer(capacity: int, dtype: torch.dtype = torch.int32) -> _Buffer:
            return _Buffer(capacity, dtype, tp.device)

        self._token_ids = buffer(tokens, torch.int64)
        self._positions = buffer(tokens, torch.int64)
        self._slot_mapping = buffer(tokens, torch.int64)
        self._seq_lens = buffer(seqs)
        self._cu_seqlens_q = buffer(seqs + 1)
        self._logits_indices = buffer(seqs, torch.int64)
        self._prompt_logits_indices = buffer(tokens, torch.int64)
        self._block_table = buffer(seqs * max_blocks)

    def allocate_kv_cache(self) -> int:
        """Sizes and allocates the KV cache; every rank gets the smallest size that any of them can hold. Returns the usable blocks."""
        if self.tp.device.type == "cuda" and self.config.num_kv_blocks is None:
            self._profile()
        fitting = kv_cache.num_blocks_that_fit(self.config, self.tp.device)
        self.num_blocks = self.tp.min(fitting)
        self.kv_cache = kv_cache.allocate(self.config, self.num_blocks, self.dtype, self.tp.device)
        return self.num_blocks

    @torch.inference_mode()
    def execute(self, batch: ForwardBatch, prompts: PromptRows | None = None) -> torch.Tensor | None:
        """Logits [num_sampling_seqs, vocab_size] in float32 on rank 0, None elsewhere. `prompts` is for rank 0 only."""
        if self._num_threads_to_set is not None:
            # Set it here, on the thread that computes: OpenMP keeps a pool per calling thread, and once all pools together have
            # more threads than the machine has cores, its barriers sleep instead of spinning (a step of the demo model: 8.8 ms,
            # not 4.0 ms).
            torch.set_num_threads(self._num_threads_to_set)
            self._num_threads_to_set = None
        if self._inputs_copied is not None:
            # The previous step's copies may still be queued after its kernels, and read the host buffers until then.
            self._inputs_copied.synchronize()
        metadata = self._metadata(batch)
        token_ids, positions = self._token_ids.fill(batch.token_ids), self._positions.fill(batch.positions)
        logits_indices = self._logits_indices.fill(batch.logits_indices)
        prompt_logits_indices = self._prompt_logits_indices.fill(batch.prompt_logits_indices)
        if self._inputs_copied is not None:
            self._inputs_copied.record()
        hidden_states = self.model(token_ids, positions, self.kv_cache, metadata)
        if prompts is not None:
            prompts.read_hidden_states(hidden_states)
        for indices in prompt_logits_indices.split(PROMPT_LOGITS_AT_ONCE) if len(prompt_logits_indices) else ():
            prompt_logits = self.model.compute_logits(hidden_states[indices])  # every rank takes part
            if prompts is not None and prompt_logits is not None:
                prompts.read_logits(prompt_logits)
        if not len(batch.logits_indices):
            return None
        return self.model.compute_logits(hidden_states[logits_indices])

    def synchronize(self) -> None:
        """Waits until the device has computed what `execute` began. Returns at once on the CPU."""
        if self.tp.device.type == "cuda":
            torch.cuda.synchronize(self.tp.device)

    def _metadata(self, batch: ForwardBatch) -> AttentionMetadata:
        cu_seqlens_q = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(batch.query_lens, dtype=np.int32)])
        return AttentionMetadata(
            slot_mapping=self._slot_mapping.fill(batch.slot_mapping),
            block_table=self._block_table.fill(batch.block_table).view(batch.block_table.shape),
            seq_lens=self._seq_lens.fill(batch.seq_lens),
            cu_seqlens_q=self._cu_seqlens_q.fill(cu_seqlens_q),
            query_lens=batch.query_lens.tolist(),
            context_lens=batch.seq_lens.tolist(),
            max_query_len=int(batch.query_lens.max()),
            max_seq_len=int(batch.seq_lens.max()),
        )

    def _profile(self) -> None:
        """Runs the largest step once with a one-block cache, so that peak memory is known before the real cache is sized."""
        config = self.config
        self.kv_cache = kv_cache.allocate(config, 1, self.dtype, self.tp.device)
        torch.cuda.reset_peak_memory_stats(self.tp.device)
        longest = min(config.max_model_len, config.max_num_batched_tokens)
        # As many sequences as may sample in one step: the logits are the largest activation.
        longest = min(longest, max(1, config.max_num_batched_tokens // config.max_num_seqs))
        num_tokens = min(config.max_num_batched_tokens, config.max_num_seqs * longest)
        num_prompt_logits = min(num_tokens, PROMPT_LOGITS_AT_ONCE)
        batch = dummy_batch(num_tokens, longest, config.block_size, num_prompt_logits=num_prompt_logits)
        self.execute(batch, _LikePromptLogprobs())
        torch.cuda.synchronize(self.tp.device)
        self.kv_cache = []


class _LikePromptLogprobs:
    """Needs as much memory as reading a slice of a prompt's log-probabilities, and as an embedding of the longest chunk."""

    def read_hidden_states(self, hidden_states: torch.Tensor) -> None:
        hidden_states.double()

    def read_logits(self, logits: torch.Tensor) -> None:
        logits.log_softmax(dim=-1).topk(1)
