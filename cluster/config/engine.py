"""Defaults of an engine's configuration that depend on the device or the model."""

from typing import Literal

Device = Literal["cpu", "cuda"]
# FlashAttention's paged kernel takes blocks in multiples of 256; on the CPU small blocks share more prefixes.
BLOCK_SIZES: dict[Device, int] = {"cpu": 16, "cuda": 256}
MAX_DEFAULT_MODEL_LEN = 32_768
