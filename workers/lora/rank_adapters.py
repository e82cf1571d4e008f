"""The adapters of one rank: on the host all that were loaded, in the slots of every layer's table those that are needed now.

Loading may happen on any thread while the engine computes. Slots change on the thread that computes, between two steps. Knows folders and
layers; no requests and no policy, see slots.py.
"""

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import CheckpointError
from workers.lora.layer import LoraLayer
from workers.lora.load import load_matrices
from workers.lora.peft_folder import content_digest, open_adapter
from workers.model_numbers import ModelConfig
from workers.thread_priority import QUARTER, Breaks, lower_priority, no_break

# Two of them are a key: numbers of the messages between ranks are 32 bits wide, with a sign.
KEY_BITS = 31
# Of the time of a load beside an engine. Measured, see benchmarks/adapters.py.
WORK_SHARE = 0.25


def adapter_key(revision: str) -> tuple[int, int]:
    """Names a revision in messages between ranks."""
    digest = int.from_bytes(hashlib.blake2b(revision.encode(), digest_size=8).digest(), "big")
    mask = (1 << KEY_BITS) - 1
    return digest & mask, digest >> KEY_BITS & mask


@dataclass(slots=True)
class _Loaded:
    """matrices: for each layer what its table prepared. is_unloaded: the owner of this rank no longer wants it. is_forgotten: rank 0 says
    that no request uses it. It goes when both are true, in whichever order that becomes known.
    """

    revision: str
    matrices: Sequence[Any | None]
    is_unloaded: bool = False
    is_forgotten: bool = False


class RankAdapters:
    """max_rank: see EngineConfig.max_lora_rank."""

    def __init__(self, layers: Sequence[LoraLayer], *, model: ModelConfig, num_slots: int, max_rank: int) -> None:
        self.num_slots = num_slots
        self.layers = layers
        self._model = model
        self._max_rank = max_rank
        self._loading = threading.Lock()  # one adapter at a time
        self._lock = threading.Lock()  # of what follows
        self._loaded: dict[tuple[int, int], _Loaded] = {}
        # Of the thread that computes.
        self._in_slots: list[tuple[int, int] | None] = [None] * num_slots

    def load(self, revision: str, folder: str | Path, *, beside_engine: bool = True) -> None:
        """Reads the adapter, unless it is here; slowly, where it is `beside_engine`, so that running streams do not wait for it.

        Raises CheckpointError, also for a folder with other content than the revision names.
        """
        key = adapter_key(revision)
        with self._loading:
            if not self._is_wanted_again(key):
                # The engine's threads come first. Of a thread of its own, because its priority never rises again.
                with ThreadPoolExecutor(1, "adapter", functools.partial(lower_priority, QUARTER)) as pool:
                    take_break = Breaks(WORK_SHARE) if beside_engine else no_break
                    pool.submit(self._read, key, revision, Path(folder), take_break).result()

    def unload(self, revision: str, *, at_once: bool) -> None:
        """at_once: there is no engine yet that could use it. Otherwise it goes when rank 0 says so as well."""
        with self._lock:
            loaded = self._loaded.get(adapter_key(revision))
            if loaded is not None:
                loaded.is_unloaded = True
                loaded.is_forgotten |= at_once
        self._drop(adapter_key(revision))

    def revisions(self) -> tuple[str, ...]:
        """Those that requests may name."""
        with self._lock:
            return tuple(sorted(loaded.revision for loaded in self._loaded.values() if not loaded.is_unloaded))

    def __contains__(self, revision: object) -> bool:
        return isinstance(revision, str) and revision in self.revisions()

    def put(self, slot: int, key: tuple[int, int]) -> bool:
        """Puts an adapter into a slot, instead of what is there. False if this rank does not have it: the slot is then empty."""
        with self._lock:
            loaded = self._loaded.get(key)
        self._fill(slot, None if loaded is None else key, None if loaded is None else loaded.matrices)
        return loaded is not None

    def clear(self, slot: int) -> None:
        self._fill(slot, None, None)

    def forget(self, key: tuple[int, int]) -> None:
        """Rank 0 says that no request uses it and none will: empties its slot."""
        if key in self._in_slots:
            self.clear(self._in_slots.index(key))
        with self._lock:
            if (loaded := self._loaded.get(key)) is not None:
                loaded.is_forgotten = True
        self._drop(key)

    def _read(self, key: tuple[int, int], revision: str, folder: Path, take_break: Callable[[], None]) -> None:
        files = open_adapter(folder, self._model, max_rank=self._max_rank, take_break=take_break)
        # Reads all of the file, so that nothing below waits for a disk while it keeps Python's lock.
        digest = content_digest(files, take_break)
        name, _, expected = revision.rpartition("@")
        if name and digest != expected:
            raise CheckpointError(
                f"{folder} has other content than the revision {revision}: its digest is {digest}.",
                remedy="Load the adapter again under its name, which makes a new revision.",
            )
        matrices = load_matrices(files, self.layers, take_break=take_break)
        with self._lock:
            self._loaded[key] = _Loaded(revision, matrices)

    def _is_wanted_again(self, key: tuple[int, int]) -> bool:
        with self._lock:
            loaded = self._loaded.get(key)
            if loaded is not None:
                loaded.is_unloaded = loaded.is_forgotten = False
            return loaded is not None

    def _drop(self, key: tuple[int, int]) -> None:
        with self._lock:
            loaded = self._loaded.get(key)
            if loaded is not None and loaded.is_unloaded and loaded.is_forgotten:
                del self._loaded[key]

    def _fill(self, slot: int, key: tuple[int, int] | None, matrices: Sequence[Any | None] | None) -> None:
        self._in_slots[slot] = key
        for i, layer in enumerate(self.layers):
            layer.table.put(slot, None if matrices is None else matrices[i])
