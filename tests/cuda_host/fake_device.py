"""The fake device as Python sees it: what a piece of code asked of the device, counted. See device/ for what the device does and knows."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Record:
    """The calls of one `recorded` block, in order: "<kind> <detail>", as in "launch <kernel> grid=64,8,1 ..." and "copy H2D pinned 512"."""

    calls: list[str] = field(default_factory=list)

    def details(self, kind: str) -> list[str]:
        return [call.removeprefix(kind).strip() for call in self.calls if call.split()[0] == kind]

    @property
    def num_launches(self) -> int:
        """Kernels, matrix products and memsets, each launched by itself."""
        return sum(len(self.details(kind)) for kind in ("launch", "product", "memset"))

    @property
    def num_graphs(self) -> int:
        return len(self.details("graph"))

    @property
    def num_synchronizations(self) -> int:
        return len(self.details("synchronize"))

    @property
    def num_collectives(self) -> int:
        return len(self.details("collective"))

    @property
    def copies(self) -> Counter[str]:
        """By direction and kind of host memory: "H2D pinned", "H2D pageable", "D2H pinned", "D2H pageable", "D2D"."""
        return Counter(" ".join(detail.split()[:-1]) for detail in self.details("copy"))

    @property
    def captured(self) -> "Record":
        """What went into graphs instead."""
        return Record(self.details("captured"))

    def summary(self) -> dict[str, int]:
        """For a table: nothing that is zero."""
        counts = {
            "graphs": self.num_graphs,
            "launches": self.num_launches,
            **{f"copies {name}": n for name, n in sorted(self.copies.items())},
            "synchronizations": self.num_synchronizations,
            "collectives": self.num_collectives,
        }
        return {name: n for name, n in counts.items() if n}


class FakeDevice:
    """Raises OSError in a process that was not started with the fake device (see build_device.py)."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libfakecuda.so")
        self._library.fake_record_at.restype = ctypes.c_char_p
        self._library.fake_unknown_at.restype = ctypes.c_char_p
        self._library.fake_used_memory.restype = ctypes.c_size_t

    @contextmanager
    def recorded(self) -> Iterator[Record]:
        """The record is complete once the block has ended."""
        record = Record()
        self.start_recording()
        try:
            yield record
        finally:
            record.calls = self.stop_recording().calls

    def start_recording(self) -> None:
        self._library.fake_record(1)

    def stop_recording(self) -> Record:
        """What was asked since the start."""
        self._library.fake_record(0)
        size = self._library.fake_record_size()
        return Record([self._library.fake_record_at(i).decode() for i in range(size)])

    @property
    def used_bytes(self) -> int:
        return self._library.fake_used_memory()

    @property
    def unknown_calls(self) -> list[str]:
        """Functions that were called and only return 0. A driver function that does not exist here counts when it is looked up."""
        return [self._library.fake_unknown_at(i).decode() for i in range(self._library.fake_unknown_size())]
