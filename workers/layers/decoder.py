"""The parts of a Mistral decoder layer: norm, attention, feed-forward. Knows no checkpoint and no cache layout.

The layers' types show where the computation is divided over ranks. Tensors are flat over the step's tokens, and in fp32 on the CPU a
token's result is bit for bit independent of the other tokens. Nothing here reads from the device on the host, and shapes depend only on
num_tokens, so a step can be captured as a CUDA graph.
"""

import torch
from torch import nn

from workers.attention.backend import AttentionBackend, AttentionMetadata
from workers.config import ModelConfig
from workers.kernels.layers.layer_kernels import TORCH_LAYER_KERNELS, LayerKernels
from workers.kernels.lora.rows import AdapterRows
from workers.kernels.lora.table import NewLoraTable
from workers.kernels.quantized_kv import Cache
from workers.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from workers.layers.rotary import Angles
from workers.parallel.group import TensorParallel
from workers.quant.method import WeightMethods, WeightSource, check_shape, new_weight
from workers.quant.quantized import dense_values
from workers.rank_shares import bounds_of


class RMSNorm(nn.Module):
    """x / rms(x) * weight; rms(x) is computed in fp32."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        kernels: LayerKernels = TORCH_LAYER_KERNELS,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = new_weight((hidden_size,), self.load_whole, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of residual + x, and the new residual, which is that sum. Without a residual, it is x. All [num_tokens, hidden_size]."""
        return self.kernels.add_rms_norm(x, residual, weight=self.weight, eps=self.eps)

    def load_whole(self, parameter: nn.Parameter, source: WeightSource, shard_id: str | None = None) -> int:
        """Every rank holds the whole parameter."""
        check_shape(source, tuple(parameter.shape))
        parameter.copy_(dense_values(source[:]))
        return parameter.numel()


class Attention(nn.Module):
    """Grouped-query attention over this rank's heads."""

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
        self.num_heads = config.num_attention_heads // tp.size
        self.head_dim = config.head_dim
        self.backend = backend
        self.kernels = kernels
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            tp=tp,
            dtype=dtype,
            device=device,
            method=methods(f"{name}.qkv_proj"),
            has_bias=config.attention_bias,
            lora=lora,
        )
        input_size = config.num_attention_heads * config.head_dim
        self.o_proj = RowParallelLinear(
            input_size,
            config.hidden_size,
            tp=tp,
            dtype=dtype,
            device=device,
            method=methods(f"{name}.o_proj"),
            has_bias=config.attention_bias,
            lora=lora,
        )

    def forward(
        self,
        x: torch.Tensor,
        angles: Angles,
        kv_cache: tuple[Cache, Cache],
        metadata: AttentionMetadata,
        adapters: AdapterRows | None = None,
    ) -> torch.Tensor:
        # x: [num_tokens, hidden_size]
        # qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]; q: [num_tokens, num_heads, head_dim]
        qkv = self.qkv_proj(x, adapters).view(x.shape[0], -1, self.head_dim)
        if angles.query_scale is not None:
            qkv[:, : self.num_heads] *= angles.query_scale
        q = self.kernels.rotary_kv(qkv, angles[:2], kv_cache=kv_cache, slot_mapping=metadata.slot_mapping)
        out = self.backend.forward(q, *kv_cache, metadata)
        return self.o_proj(out.reshape(x.shape[0], -1), adapters)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        name: str,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        methods: WeightMethods,
        kernels: LayerKernels,
        has_bias: bool = False,
        lora: NewLoraTable | None = None,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        bounds = bounds_of(intermediate_size, tp.size)
        share = slice(bounds[tp.rank], bounds[tp.rank + 1])
        output_sizes = [("gate", intermediate_size), ("up", intermediate_size)]
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size,
            output_sizes,
            tp=tp,
            dtype=dtype,
            device=device,
            method=methods(f"{name}.gate_up_proj"),
            has_bias=has_bias,
            rows={"gate": [share], "up": [share]},
            lora=lora,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            tp=tp,
            dtype=dtype,
            device=device,
            method=methods(f"{name}.down_proj"),
            has_bias=has_bias,
            columns=share,
            lora=lora,
        )

    def forward(self, x: torch.Tensor, adapters: AdapterRows | None = None) -> torch.Tensor:
        # x: [num_tokens, hidden_size]
        # gated: [num_tokens, this rank's share of intermediate_size]
        gated = self.gate_up_proj.multiply_gated(x, adapters)
        if gated is None:
            gated = self.kernels.silu_mul(self.gate_up_proj(x, adapters))
        return self.down_proj(gated, adapters)
