"""The parts of a Mistral decoder layer: norm, rotary embedding, attention, feed-forward. Knows no checkpoint and no cache layout.

The layers' types show where the computation is divided over ranks. Tensors are flat over the step's tokens, and in fp32 on the CPU a
token's result is bit for bit independent of the other tokens. Nothing here reads from the device on the host, and shapes depend only on
num_tokens, so a step can be captured as a CUDA graph.
"""

import torch
from torch import nn

from workers.attention.backend import AttentionBackend, AttentionMetadata
from workers.config import ModelConfig
from workers.kernels.layer_kernels import TORCH_LAYER_KERNELS, LayerKernels
from workers.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from workers.parallel.group import TensorParallel
from workers.quant.method import WeightMethod, WeightSource, check_shape, new_weight


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
        parameter.copy_(source[:])
        return parameter.numel()


class RotaryEmbedding(nn.Module):
    """Rotates each head's (i, i + head_dim / 2) pairs by position * theta^(-2i / head_dim): the order of Hugging Face's checkpoints.

    For head_dim 4 and the angles a, b of a position, the cache holds cos = [cos a, cos b, cos a, cos b] and
    sin = [-sin a, -sin b, sin a, sin b], so that rotated = x * cos + roll(x, 2) * sin.
    """

    def __init__(self, head_dim: int, theta: float, *, max_positions: int, device: torch.device | str) -> None:
        super().__init__()
        # The formula is transformers' to the last bit: at position 40,000 other rounding changes the angle by 0.002 radians.
        inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inv_freq)
        cos, sin = angles.cos(), angles.sin()
        cos_sin = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=1)
        self.cos_sin: torch.Tensor
        self.register_buffer("cos_sin", cos_sin.to(device), persistent=False)  # [max_positions, 2, head_dim], fp32

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for `rotary_kv`, each [num_tokens, 1, head_dim]; once per step serves all layers. positions: [num_tokens]."""
        cos, sin = self.cos_sin[positions].split(1, dim=1)
        return cos, sin


class Attention(nn.Module):
    """Grouped-query attention over this rank's heads."""

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
            method=method,
        )
        input_size = config.num_attention_heads * config.head_dim
        self.o_proj = RowParallelLinear(
            input_size, config.hidden_size, tp=tp, dtype=dtype, device=device, method=method
        )

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        # x: [num_tokens, hidden_size]
        # qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]; q: [num_tokens, num_heads, head_dim]
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q = self.kernels.rotary_kv(qkv, angles, kv_cache=kv_cache, slot_mapping=metadata.slot_mapping)
        out = self.backend.forward(q, *kv_cache, metadata)
        return self.o_proj(out.reshape(x.shape[0], -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str,
        method: WeightMethod,
        kernels: LayerKernels,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        output_sizes = [("gate", intermediate_size), ("up", intermediate_size)]
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, output_sizes, tp=tp, dtype=dtype, device=device, method=method
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, tp=tp, dtype=dtype, device=device, method=method
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: [num_tokens, hidden_size]
        # gate_up: [num_tokens, 2 * intermediate_size / size]
        gate_up = self.gate_up_proj(x)
        return self.down_proj(self.kernels.silu_mul(gate_up))
