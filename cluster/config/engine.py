"""Defaults of an engine's configuration that depend on the device or the model."""

from typing import Literal

from workers.config import AttentionChoice, EngineConfig

Device = Literal["cpu", "cuda"]
# Small blocks share more prefixes and waste less memory, so EngineConfig.block_size is the default everywhere else. FlashAttention's paged
# kernel takes blocks in multiples of 256.
FLASH_BLOCK_SIZE = 256
MAX_DEFAULT_MODEL_LEN = 32_768


def default_block_size(attention_backend: AttentionChoice) -> int:
    return FLASH_BLOCK_SIZE if attention_backend == "flash" else EngineConfig.block_size
