"""ggml's types of tensors: which run, in what form each is kept, and what that takes. Knows no bytes (see weights/gguf) and no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedType:
    """Whole numbers with a scale, and a minimum, for each group of inputs; wide: these are products, which need float32."""

    num_bits: Literal[4, 8]
    group_size: int
    has_minima: bool = False
    wide: bool = False


# Whole numbers with scales hold these exactly, and they keep their bits; those of 5 and 6 bits become 8.
GROUPED_TYPES = {
    "Q4_0": GroupedType(num_bits=4, group_size=32),
    "Q4_1": GroupedType(num_bits=4, group_size=32, has_minima=True),
    "Q4_K": GroupedType(num_bits=4, group_size=32, has_minima=True, wide=True),
    "Q5_0": GroupedType(num_bits=8, group_size=32),
    "Q5_1": GroupedType(num_bits=8, group_size=32, has_minima=True),
    "Q5_K": GroupedType(num_bits=8, group_size=32, has_minima=True, wide=True),
    "Q8_0": GroupedType(num_bits=8, group_size=32),
    "IQ4_NL": GroupedType(num_bits=8, group_size=32),
    "IQ4_XS": GroupedType(num_bits=8, group_size=32, wide=True),
    "MXFP4": GroupedType(num_bits=8, group_size=32, wide=True),
    "TQ1_0": GroupedType(num_bits=4, group_size=256),
    "TQ2_0": GroupedType(num_bits=4, group_size=256),
    "Q2_K": GroupedType(num_bits=4, group_size=16, has_minima=True, wide=True),
    "Q3_K": GroupedType(num_bits=4, group_size=16, wide=True),
    "Q6_K": GroupedType(num_bits=8, group_size=16, wide=True),
}
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
# The `gguf` package makes floats of these, which are then kept in the engine's own type.
EXPANDED_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4")


def is_supported(dtype: str) -> bool:
    return dtype in GROUPED_TYPES or dtype in FLOAT_TYPES or dtype in EXPANDED_TYPES
