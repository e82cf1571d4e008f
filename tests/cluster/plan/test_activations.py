"""The planned activations against what the model's layers hold, tensor by tensor, in a step like the engine's profiling pass."""

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.plan import memory
from cluster.plan.models import V0_3
from workers.config import EngineConfig
from workers.engine.execution import model_runner
from workers.engine.execution.graphs import cuda_graphs
from workers.engine.execution.graphs.decode_padding import decode_sizes
from workers.model.mistral import MistralForCausalLM
from workers.parallel.group import SingleRank
from workers.quant.pack_cuda import WORKSPACE_BYTES

NUM_TOKENS = 256
SMALL = replace(V0_3, hidden_size=512, num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=2, vocab_size=64)


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operators allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._now += num_bytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self._now -= num_bytes


class NoAttention:
    """As much memory as the CUDA kernel takes: its result."""

    name = "none"

    def forward(self, q: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(q)


class NoKernels:
    """As much memory as the Triton kernels of workers/kernels take: their results."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(x), x if residual is None else torch.empty_like(x)

    def rotary_kv(self, qkv: torch.Tensor, angles: Any, *, kv_cache: Any, slot_mapping: torch.Tensor) -> torch.Tensor:
        num_kv_heads = kv_cache[0].shape[2]
        return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * num_kv_heads, qkv.shape[2])

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"intermediate_size": 1792}, "feed-forward"),
        ({"intermediate_size": 256, "num_key_value_heads": 4}, "attention"),
        ({"intermediate_size": 256, "vocab_size": 8192}, "logits"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_activations_are_those_of_the_model(changes, what):
    config = EngineConfig(
        model_path="",
        model=replace(SMALL, **changes),
        dtype="bfloat16",
        max_model_len=NUM_TOKENS,
        max_num_batched_tokens=NUM_TOKENS,
    )
    model = MistralForCausalLM(
        config.model,
        tp=SingleRank(torch.device("cpu")),
        backends=[NoAttention()],
        dtype=torch.bfloat16,
        device="cpu",
        max_positions=NUM_TOKENS,
        kernels=NoKernels(),
    )
    token_ids = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    metadata: Any = [SimpleNamespace(slot_mapping=token_ids)]
    cache = torch.empty(1, config.block_size, config.model.num_key_value_heads, config.model.head_dim)
    with torch.inference_mode(), PeakBytes() as seen:
        hidden_states = model(token_ids, token_ids, [(cache, cache)] * config.model.num_hidden_layers, metadata)
        hidden_states.double()
        logits = model.compute_logits(hidden_states[: memory.PROMPT_LOGITS_AT_ONCE])
        assert logits is not None
        logits.log_softmax(dim=-1)
    planned = memory.activation_bytes(config)
    assert seen.peak * 0.98 < planned < seen.peak * 1.1, f"{what}: {planned:,} planned, {seen.peak:,} seen"


def test_the_plan_knows_the_engines_numbers():
    assert memory.DEQUANTIZED_BYTES == WORKSPACE_BYTES
    assert memory.PROMPT_LOGITS_AT_ONCE == model_runner.PROMPT_LOGITS_AT_ONCE
    assert memory.DRIVER_BYTES_PER_GRAPH == cuda_graphs.DRIVER_BYTES_PER_GRAPH
    for max_num_seqs in (1, 2, 3, 16, 17, 48, 64, 65, 100, 256, 1000):
        assert memory.num_decode_graphs(max_num_seqs) == len(decode_sizes(max_num_seqs)), max_num_seqs
