"""How a GGUF file stores a model's matrices, for the sums of memory and the banner. Knows types and sizes; no bytes and no torch."""

import math
from collections import Counter
from collections.abc import Mapping

from workers.checkpoint.gguf.gguf_file import GgufTensor
from workers.checkpoint.gguf.gguf_types import EXPANDED_TYPES, FLOAT_TYPES, GROUPED_TYPES
from workers.stored_weights import SMALLEST_GROUP, StoredWeights, grouped_bits

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_NUM_NAMED = 3


def read_stored(tensors: Mapping[str, GgufTensor]) -> StoredWeights | None:
    """None for a file without quantised matrices."""
    layers = [t for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
    head = tensors.get(HEAD) or tensors.get(EMBEDDING)
    matrices = [*layers, *([] if head is None else [head])]
    sizes: Counter[str] = Counter()
    for tensor in matrices:
        sizes[tensor.dtype] += _num_weights(tensor)
    quantized = [name for name, _ in sizes.most_common() if name not in FLOAT_TYPES]
    if not quantized:
        return None
    named = quantized[:_NUM_NAMED]
    label = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    expanded = [name for name in quantized if name in EXPANDED_TYPES]
    if expanded:
        label += f" ({', '.join(expanded)} as plain numbers)"
    total = max(1, sum(map(_num_weights, layers)))
    bits = sum((_bits(t.dtype) or 0.0) * _num_weights(t) for t in layers) / total
    return StoredWeights(
        method="gguf",
        label=f"GGUF {label}",
        layer_bits=bits,
        file_bits=bits,
        head_bits=None if head is None else _bits(head.dtype),
        dense_share=sum(_num_weights(t) for t in layers if t.dtype not in GROUPED_TYPES) / total,
        group_size=SMALLEST_GROUP if any(t.dtype in GROUPED_TYPES for t in layers) else None,
    )


def _bits(dtype: str) -> float | None:
    """None: in the engine's dtype. A group of 16 is padded to 32 (weights/gguf/tensor.py), and one of 256 repeats its scale."""
    kind = GROUPED_TYPES.get(dtype)
    if kind is None:
        return None
    bits = grouped_bits(kind.num_bits, has_minima=kind.has_minima, wide=kind.wide, group_size=SMALLEST_GROUP)
    return bits * max(1, SMALLEST_GROUP // kind.group_size)


def _num_weights(tensor: GgufTensor) -> int:
    return math.prod(tensor.shape)
