"""The metadata of one architecture in a GGUF file, by the names that all architectures share. Knows no model and no file."""

import struct
from collections.abc import Mapping
from typing import Any

from workers.checkpoint.numbers import decimal
from workers.checkpoint.regular_file import shown
from workers.errors import ConfigError


class Fields:
    """`get("block_count")` is the value of "llama.block_count" where the architecture is "llama"."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def key(self, name: str) -> str:
        return f"{self._architecture}.{name}"

    def get(self, name: str) -> Any:
        return self._metadata.get(self.key(name))

    def whole(self, name: str) -> Any:
        """ModelConfig checks that it is a whole number; a list of equal ones counts as one. Raises ConfigError if there is none."""
        value = self.get(name)
        if value is None:
            raise ConfigError(
                f"The GGUF file lacks the field {self.key(name)!r}.",
                remedy="Use a file that llama.cpp's converter made.",
                param=self.key(name),
            )
        if not isinstance(value, list):
            return value
        if len(set(value)) == 1:
            return value[0]
        raise ConfigError(
            f"The GGUF file's {self.key(name)} differs from layer to layer ({shown(value)}), which is not supported.",
            remedy="Use a model whose layers all have the same sizes.",
            param=self.key(name),
        )

    def number(self, name: str, *, default: float | None = None) -> float:
        """A float32 as the decimal number that it stands for: 9.999999747378752e-06 is 1e-05. Raises ConfigError."""
        value = self.get(name)
        if value is None:
            if default is None:
                self.whole(name)
            return float(default or 0)
        number = decimal(self.key(name), value)
        short = float(f"{number:.7g}")
        return short if struct.pack("f", short) == struct.pack("f", number) else number
