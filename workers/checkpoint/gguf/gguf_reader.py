"""The `gguf` package's reader, with lists read in one pass and the tensors' places checked against the file's size.

Overrides two private methods of the package, which is why pyproject.toml pins it. Imports the package, half a second, so gguf_file.py
imports this file late. Knows no model.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from workers.checkpoint.regular_file import shown

MAX_ELEMENTS = 1 << 40  # of one tensor; many times the largest of any published model


class DamagedError(Exception):
    """What is wrong, as the end of a sentence that begins with the file, and what to do if it is not to download it again."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class QuickReader(gguf.GGUFReader):
    """metadata: {key: value}. places: {tensor: (type, shape with rows first, first byte, byte after the last)}."""

    def __init__(self, path: Path) -> None:
        self.places: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        super().__init__(path)
        self.metadata = {key: self._value(field) for key, field in self.fields.items() if not key.startswith("GGUF.")}

    def _value(self, field: gguf.ReaderField) -> Any:
        # A list is what `_get_field_parts` left, and a list without elements has the type of none.
        return field.parts[-1] if field.types[0] is GGUFValueType.ARRAY else field.contents()

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return gguf.GGUFReader._get_field_parts(self, orig_offs, raw_type)
        raw_element, count = struct.unpack_from("<IQ", self.data.data, orig_offs)
        element, start = GGUFValueType(raw_element), orig_offs + 12
        values: list[Any]
        if element is GGUFValueType.STRING:
            values = []
            end = start
            for text, end in self._strings(start, count):  # noqa: B007 (where the last ends)
                values.append(text)
        elif element in self.gguf_scalar_to_np:
            dtype = np.dtype(self.gguf_scalar_to_np[element])
            end = start + count * dtype.itemsize
            if end > len(self.data):
                raise DamagedError("is truncated in its header")
            values = np.frombuffer(self.data, dtype, count, start).tolist()
        else:
            raise DamagedError(f"has a list of {element.name.lower()}s in its metadata, which is not supported")
        return end - orig_offs, [values], [0], [GGUFValueType.ARRAY, element]

    def _strings(self, start: int, count: int) -> Iterator[tuple[str, int]]:
        """Each string of a list, and where it ends. A string is 8 bytes with its length, and UTF-8."""
        view, size = self.data.data, len(self.data)
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", view, start)
            start += 8
            if start + length > size:
                raise DamagedError("is truncated in its header")
            yield str(view[start : start + length], "utf-8"), start + length
            start += length

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            _, name_bytes, _, dimensions, raw_type, offset = field.parts
            name = str(bytes(name_bytes), "utf-8")
            if name in self.places:
                raise DamagedError(f"has the tensor {shown(name)} twice")
            self.places[name] = self._place(name, dimensions.tolist(), int(raw_type[0]), start_offs + int(offset[0]))
        expected = max((end for _, _, _, end in self.places.values()), default=start_offs)
        if len(self.data) < expected:
            raise DamagedError(f"is truncated: it has {len(self.data):,} bytes instead of {expected:,}")
        last, before = start_offs, ""
        for name, (_, _, start, end) in sorted(self.places.items(), key=lambda item: item[1][2:]):
            if start < last:
                raise DamagedError(
                    f"is damaged: the tensor {shown(name)} overlaps {shown(before) if before else 'the header'}"
                )
            last, before = end, name

    def _place(
        self, name: str, dimensions: list[int], raw_type: int, start: int
    ) -> tuple[str, tuple[int, ...], int, int]:
        if raw_type not in set(GGMLQuantizationType):
            raise DamagedError(
                f"has the tensor {shown(name)} of type {raw_type}, which is not known here",
                remedy="Use a file of another type, for example Q4_K_M or Q8_0.",
            )
        dtype, num_elements = GGMLQuantizationType(raw_type), 1
        for size in dimensions:
            num_elements *= size
        block_size, block_bytes = GGML_QUANT_SIZES[dtype]
        if not dimensions or not 0 < num_elements <= MAX_ELEMENTS or dimensions[0] % block_size:
            raise DamagedError(f"is damaged: the tensor {shown(name)} has an impossible shape {shown(dimensions)}")
        # The file has the size of a row first.
        return dtype.name, tuple(reversed(dimensions)), start, start + num_elements // block_size * block_bytes
