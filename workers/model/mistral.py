"""Mistral (and Llama checkpoints of the same structure), top to bottom. Knows how the layers join and how they are named.

Names are Hugging Face's, except that `packed_modules` fuses the projections that share an input; weights/ translates Mistral's own names.
Does not know where weights come from, how they are kept in memory, how the KV cache is allocated, or how tokens are chosen.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from workers.attention.backend import AttentionBackend, AttentionMetadata, KVCaches, StepMetadata
from workers.config import ModelConfig
from workers.kernels.layers.layer_kernels import TORCH_LAYER_KERNELS, LayerKernels
from workers.kernels.lora.rows import AdapterRows
from workers.kernels.lora.table import NewLoraTable
from workers.kernels.quantized_kv import Cache
from workers.layers.decoder import MLP, Attention, RMSNorm
from workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from workers.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from workers.layers.rotary import Angles, RotaryEmbedding
from workers.lora.layer import LoraLayer, LoraModule
from workers.parallel.group import TensorParallel
from workers.quant.dense import ALL_DENSE
from workers.quant.method import WeightMethods


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
        backends: Sequence[AttentionBackend],
        dtype: torch.dtype,
        device: torch.device | str,
        max_positions: int,
        methods: WeightMethods = ALL_DENSE,
        kernels: LayerKernels = TORCH_LAYER_KERNELS,
        lora: NewLoraTable | None = None,
    ) -> None:
        """`backends` serve this rank's heads, one for each group of layers. methods: by the module's name,
        "model.layers.0.self_attn.qkv_proj" or "lm_head". lora: makes the tables of adapters; None is a model without.

        Positions run from 0 to max_positions - 1.
        """
        super().__init__()
        self.model = MistralModel(
            config,
            tp=tp,
            backends=backends,
            dtype=dtype,
            device=device,
            max_positions=max_positions,
            methods=methods,
            kernels=kernels,
            lora=lora,
        )
        head = methods("lm_head")
        tied = self.model.embed_tokens if config.tie_word_embeddings and head.shares_embedding else None
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, tp=tp, dtype=dtype, device=device, tied=tied, method=head
        )

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: KVCaches,
        metadata: StepMetadata,
        adapters: AdapterRows | None = None,
    ) -> torch.Tensor:
        """token_ids, positions: [num_tokens] int; kv_caches: of each layer; metadata: of each group of layers; adapters: None where no row
        has one.

        Returns hidden states [num_tokens, hidden_size], the same on all ranks.
        """
        return self.model(token_ids, positions, kv_caches, metadata, adapters)

    def compute_logits(self, hidden_states: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """hidden_states: [n, hidden_size], n >= 0. Returns fp32 logits [n, vocab_size] on rank 0, None elsewhere. out: memory for them,
        which need not be used.
        """
        logits: torch.Tensor | None = self.lm_head(hidden_states, out)
        return logits

    def lora_layers(self) -> list[LoraLayer]:
        """The linear layers of the decoder that take adapters, and which part of each module they compute on this rank."""
        found = []
        for name, linear in self.model.layers.named_modules():
            if isinstance(linear, MergedColumnParallelLinear | RowParallelLinear) and linear.lora is not None:
                number, last = name.split(".")[0], name.split(".")[-1]
                shards = self.packed_modules.get(last, {last: None})
                modules = [LoraModule(module, *linear.share(shard)) for module, shard in shards.items()]
                found.append(LoraLayer(int(number), tuple(modules), linear.lora))
        return found


class MistralModel(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        *,
        tp: TensorParallel,
        backends: Sequence[AttentionBackend],
        dtype: torch.dtype,
        device: torch.device | str,
        max_positions: int,
        methods: WeightMethods,
        kernels: LayerKernels,
        lora: NewLoraTable | None = None,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, tp=tp, dtype=dtype, device=device, kernels=kernels
        )
        self.rotary = RotaryEmbedding(
            config.head_dim,
            config.rope_theta,
            max_positions=max_positions,
            device=device,
            scaling=config.rope_scaling,
            query_scaling=config.query_scaling,
        )
        self.group_of_layer = config.group_of_layer
        self.layers = nn.ModuleList(
            MistralLayer(
                config,
                name=f"model.layers.{i}",
                backend=backends[group],
                tp=tp,
                dtype=dtype,
                device=device,
                methods=methods,
                kernels=kernels,
                lora=lora,
            )
            for i, group in enumerate(self.group_of_layer)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device, kernels=kernels)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: KVCaches,
        metadata: StepMetadata,
        adapters: AdapterRows | None = None,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(token_ids)  # [num_tokens, hidden_size]
        angles = self.rotary.angles(positions)
        residual = None
        for layer, kv_cache, group in zip(self.layers, kv_caches, self.group_of_layer, strict=True):
            hidden_states, residual = layer(hidden_states, residual, angles, kv_cache, metadata[group], adapters)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class MistralLayer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        *,
        name: str,
        backend: AttentionBackend,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        methods: WeightMethods,
        kernels: LayerKernels,
        lora: NewLoraTable | None = None,
    ) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device, kernels=kernels)

        self.input_layernorm = norm()
        self.self_attn = Attention(
            config,
            name=f"{name}.self_attn",
            backend=backend,
            tp=tp,
            dtype=dtype,
            device=device,
            methods=methods,
            kernels=kernels,
            lora=lora,
        )
        self.post_attention_layernorm = norm()
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            name=f"{name}.mlp",
            tp=tp,
            dtype=dtype,
            device=device,
            methods=methods,
            kernels=kernels,
            has_bias=config.mlp_bias,
            lora=lora,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        angles: Angles,
        kv_cache: tuple[Cache, Cache],
        metadata: AttentionMetadata,
        adapters: AdapterRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual lags by one block, so that each block's output is added to it by the norm that follows, in one kernel.

        hidden_states: what the block before computed; its sum with the residual is this layer's input. Returns both in the same form.
        """
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, angles, kv_cache, metadata, adapters)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states, adapters), residual
