"""Rotary embedding: the table of cosines and sines of all positions, also of models whose context was stretched.

The formulas are transformers' to the last bit: at position 40,000 other rounding changes an angle by 0.002 radians. Knows no checkpoint and
no cache. Nothing here reads from the device on the host.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from workers.rope import QueryScaling, RopeScaling


class Angles(NamedTuple):
    """Of a step's tokens, for `rotary_kv`: cos and sin are [num_tokens, 1, head_dim] fp32, and serve all layers.

    query_scale: [num_tokens, 1, 1] fp32, by which queries are multiplied; None in most models.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None


class RotaryEmbedding(nn.Module):
    """Rotates each head's (i, i + head_dim / 2) pairs by position * theta^(-2i / head_dim): the order of Hugging Face's checkpoints.

    For head_dim 4 and the angles a, b of a position, the cache holds cos = [cos a, cos b, cos a, cos b] and
    sin = [-sin a, -sin b, sin a, sin b], so that rotated = x * cos + roll(x, 2) * sin.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        *,
        max_positions: int,
        device: torch.device | str,
        scaling: RopeScaling | None = None,
        query_scaling: QueryScaling | None = None,
    ) -> None:
        super().__init__()
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(head_dim, theta, scaling))
        cos, sin = angles.cos(), angles.sin()
        if scaling is not None and scaling.attention_factor != 1.0:
            cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
        cos_sin = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=1)
        self.cos_sin: torch.Tensor
        self.register_buffer("cos_sin", cos_sin.to(device), persistent=False)  # [max_positions, 2, head_dim], fp32
        self.query_scale: torch.Tensor | None
        scale = None
        if query_scaling is not None:
            periods = torch.floor(positions / query_scaling.original_max_position_embeddings)
            scale = (1 + query_scaling.beta * torch.log(1 + periods)).view(-1, 1, 1).to(device)
        self.register_buffer("query_scale", scale, persistent=False)  # [max_positions, 1, 1], fp32

    def angles(self, positions: torch.Tensor) -> Angles:
        """Once per step. positions: [num_tokens]."""
        cos, sin = self.cos_sin[positions].split(1, dim=1)
        return Angles(cos, sin, None if self.query_scale is None else self.query_scale[positions])


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Radians per position of each pair: [head_dim / 2] fp32."""
    pair_theta = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / pair_theta
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "factors":
        return plain / torch.tensor(scaling.factors, dtype=torch.float32)
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling)
    return _yarn(pair_theta, scaling, head_dim=head_dim, theta=theta)


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are stretched by the factor, short ones are not, and between them it goes smoothly."""
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / plain
    is_long, is_short = wavelengths > original / low, wavelengths < original / high
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * plain / scaling.factor + smooth * plain
    return torch.where(is_long, plain / scaling.factor, torch.where(is_short, plain, between))


def _yarn(pair_theta: torch.Tensor, scaling: RopeScaling, *, head_dim: int, theta: float) -> torch.Tensor:
    """Peng et al., 2023. Pairs up to `low` turn often in the first context and are not stretched, those from `high` on are."""

    def pair_that_turns(times: float) -> float:
        original = scaling.original_max_position_embeddings
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * pair_theta) * (1 - kept) + 1.0 / pair_theta * kept
