"""How a model's rotary embedding is stretched to longer contexts than it was first trained on. Frozen values only.

The formulas are in layers/rotary.py. Knows no file, no torch.
"""

from dataclasses import dataclass
from typing import Literal

RopeType = Literal["linear", "llama3", "yarn", "factors"]
# What config.json may name.
ROPE_TYPES: tuple[RopeType, ...] = ("linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """`factor`: how many times longer. `original_max_position_embeddings`: the first context; linear scaling does not need it.

    `attention_factor` multiplies cosines and sines, so scores are multiplied by its square.
    """

    rope_type: RopeType
    factor: float
    original_max_position_embeddings: int = 0
    # llama3: wavelengths above original / low are stretched, those below original / high are not, and those between partly.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn: pairs that turn more often than beta_fast in the first context are not stretched, those below beta_slow are.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    # factors: of GGUF files, which keep only what llama3's formula gives: what the frequency of each pair is divided by.
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """A query at position p is multiplied by 1 + beta * log(1 + floor(p / original_max_position_embeddings)): Ministral 3."""

    beta: float
    original_max_position_embeddings: int
