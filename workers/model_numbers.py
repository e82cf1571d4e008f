"""What the model is: frozen, validated numbers. Refuses numbers that no model has.

Does not know the files that they come from (checkpoint/), torch and weights.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

from workers.errors import ConfigError
from workers.layer_groups import LayerGroup, group_layers
from workers.rank_shares import largest_share, num_kv_heads_of_rank
from workers.rope import QueryScaling, RopeScaling
from workers.stored_weights import StoredWeights

Layout = Literal["huggingface", "mistral", "gguf"]
Dtype = Literal["float32", "bfloat16", "float16"]
# The most that is believed of a checkpoint, each several times the largest of any published model. Beyond it, a number is a mistake that
# would only be noticed when memory runs out.
MAX_SIZES = {
    "vocab_size": 1 << 23,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 11,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 30,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that define a Mistral-structured decoder.

    `sliding_window` counts the token itself; None is full attention. A tuple has a window for each layer, and not all the same.
    `attention_bias`, `mlp_bias`: whether these projections add a bias. `has_vision`: the checkpoint also has an encoder of images, which is
    left out. `stored`: how a quantised checkpoint keeps its matrices; None for a dense one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | tuple[int | None, ...] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: Dtype
    layout: Layout
    rope_scaling: RopeScaling | None = None
    query_scaling: QueryScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    has_vision: bool = False
    stored: StoredWeights | None = None

    @functools.cached_property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        window = self.sliding_window
        return window if isinstance(window, tuple) else (window,) * self.num_hidden_layers

    @functools.cached_property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """Layers that share KV block ids; one group where all layers have the same window. The widest windows come first."""
        return group_layers(self.layer_windows)

    @property
    def layers_per_group(self) -> int:
        """Of how many layers a KV block has the keys and values."""
        return max(len(group.layers) for group in self.layer_groups)

    @functools.cached_property
    def group_of_layer(self) -> tuple[int, ...]:
        groups = {layer: i for i, group in enumerate(self.layer_groups) for layer in group.layers}
        return tuple(groups[layer] for layer in range(self.num_hidden_layers))

    @property
    def widest_window(self) -> int | None:
        return self.layer_groups[0].window

    def __post_init__(self) -> None:
        for name, largest in MAX_SIZES.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= largest:
                raise ConfigError(
                    f"The checkpoint's {name} is {value!r:.60}, not a whole number from 1 to {largest:,}.",
                    remedy="Correct it, or download the file again.",
                    param=name,
                )
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"The checkpoint's {name} is {getattr(self, name)!r}.", remedy="Use a number above 0.", param=name
                )
        for token_id in (self.bos_token_id, *self.eos_token_ids):
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ConfigError(
                    f"The checkpoint names {token_id!r:.60} as a bos or eos token, but its token ids are 0 to {self.vocab_size - 1}.",
                    remedy="Correct bos_token_id and eos_token_id, or download the file again.",
                    param="eos_token_id",
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"The checkpoint has {self.num_attention_heads} attention heads, which its {self.num_key_value_heads} "
                "key/value heads do not divide.",
                remedy="Correct num_key_value_heads, or download the file again.",
                param="num_key_value_heads",
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"The checkpoint's head_dim is {self.head_dim}, but rotary embedding needs an even one.",
                remedy="Use a checkpoint with an even one.",
                param="head_dim",
            )
        windows = self.sliding_window if isinstance(self.sliding_window, tuple) else (self.sliding_window,)
        for window in windows:
            if window is not None and (type(window) is not int or window < 1):
                raise ConfigError(
                    f"The checkpoint's sliding_window is {window!r:.60}.",
                    remedy="Use a positive number or null.",
                    param="sliding_window",
                )
        assert len(windows) in (1, self.num_hidden_layers), "a window for each layer"

    def check_tensor_parallel_size(self, size: int) -> None:
        """Raises ConfigError unless `size` ranks can share this model. What a quantised form asks for: see EngineConfig."""
        if size in self.tensor_parallel_sizes:
            return
        heads = self.num_attention_heads
        if size < 1 or heads % size:
            why = f"its {heads} attention heads do not divide evenly over the ranks"
        else:
            why = f"its intermediate size {self.intermediate_size} is less than the number of ranks"
        raise ConfigError(
            f"--tensor-parallel-size {size} does not work with this model: {why}.",
            remedy=f"Use one of {', '.join(map(str, self.tensor_parallel_sizes))}.",
            param="--tensor-parallel-size",
        )

    @functools.cached_property
    def tensor_parallel_sizes(self) -> tuple[int, ...]:
        """How many ranks can share this model: any number that divides the query heads. See rank_shares.py for what each rank has."""
        heads = self.num_attention_heads
        return tuple(n for n in range(1, heads + 1) if heads % n == 0 and n <= self.intermediate_size)

    def kv_heads_per_rank(self, tensor_parallel_size: int) -> int:
        return num_kv_heads_of_rank(
            tensor_parallel_size, num_heads=self.num_attention_heads, num_kv_heads=self.num_key_value_heads
        )

    def intermediate_per_rank(self, tensor_parallel_size: int) -> int:
        """Of the rank with the most."""
        return largest_share(self.intermediate_size, tensor_parallel_size)
