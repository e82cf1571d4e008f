"""Mistral (and Llama checkpoints of the same structure), top to bottom. Knows how the layers join and how they are named.

Names are Hugging Face's, except that `packed_modules` fuses the projections that share an input; weights/ translates Mistral's own names.
Does not know where weights come from, how they are kept in memory, how the KV cache is allocated, or how tokens are chosen.
"""

from typing import ClassVar

import torch
from torch import nn

from workers.attention.backend import AttentionBackend, AttentionMetadata, KVCaches
from workers.config import ModelConfig
from workers.kernels.layer_kernels import TORCH_LAYER_KERNELS, LayerKernels
from workers.layers.decoder import MLP, Attention, RMSNorm, RotaryEmbedding
from workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from workers.parallel.group import TensorParallel
from workers.quant.dense import DENSE
from workers.quant.method import WeightMethod


class MistralForCausalLM(nn.Module):
    """One rank's part of the model. Parameters are unfilled until `loader.load_weights`."""

    # module here: {module in the checkpoint: its shard}
    packed_modules: ClassVar[dict[str, dict[str, str]]] = {
        "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
        "gate_up_proj": {"gate_proj": "gate", "up_proj": "up"},
    }

    def __init__(
        self,
        config: ModelConfig,
        *,
        tp: TensorParallel,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device | str,
        max_positions: int,
        method: WeightMethod = DENSE,
        kernels: LayerKernels = TORCH_LAYER_KERNELS,
    ) -> None:
        """`backend` serves this rank's heads, `method` all weight matrices. Positions run from 0 to max_positions - 1."""
        super().__init__()
        self.model = MistralModel(
            config,
            tp=tp,
            backend=backend,
            dtype=dtype,
            device=device,
            max_positions=max_positions,
            method=method,
            kernels=kernels,
        )
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, tp=tp, dtype=dtype, device=device, tied=tied, method=method
        )

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, kv_caches: KVCaches, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """token_ids, positions: [num_tokens] int. Returns hidden states [num_tokens, hidden_size], the same on all ranks."""
        return self.model(token_ids, positions, kv_caches, metadata)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """hidden_states: [n, hidden_size], n >= 0. Returns fp32 logits [n, vocab_size] on rank 0, None elsewhere."""
        logits = self.lm_head(hidden_states)
        return None if logits is None else logits.float()


class MistralModel(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        *,
        tp: TensorParallel,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device | str,
        max_positions: int,
        method: WeightMethod,
        kernels: LayerKernels,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, tp=tp, dtype=dtype, device=device
        )
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, max_positions=max_positions, device=device)
        self.layers = nn.ModuleList(
            MistralLayer(config, backend=backend, tp=tp, dtype=dtype, device=device, method=method, kernels=kernels)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device, kernels=kernels)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, kv_caches: KVCaches, metadata: AttentionMetadata
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(token_ids)  # [num_tokens, hidden_size]
        angles = self.rotary.angles(positions)
        residual = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_states, residual = layer(hidden_states, residual, angles, kv_cache, metadata)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class MistralLayer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: AttentionBackend,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        method: WeightMethod,
        kernels: LayerKernels,
    ) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device, kernels=kernels)

        self.input_layernorm = norm()
        self.self_attn = Attention(
            config, backend=backend, tp=tp, dtype=dtype, device=device, method=method, kernels=kernels
        )
        self.post_attention_layernorm = norm()
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            tp=tp,
            dtype=dtype,
            device=device,
            method=method,
            kernels=kernels,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual lags by one block, so that each block's output is added to it by the norm that follows, in one kernel.

        hidden_states: what the block before computed; its sum with the residual is this layer's input. Returns both in the same form.
        """
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, angles, kv_cache, metadata)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual
