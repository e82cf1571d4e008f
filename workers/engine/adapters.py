"""The adapters of an engine on rank 0: tells all ranks which one is in which slot, and when one is no longer needed.

Knows revisions, slots and ranks; no requests. All methods belong to the engine thread, except `in`, which may be asked on any.
"""

from workers.engine.batch import adapter_message
from workers.engine.execution.model_runner import ModelRunner
from workers.lora.rank_adapters import RankAdapters, adapter_key
from workers.lora.slots import NO_SLOT, AdapterSlots
from workers.parallel.group import TensorParallel


class EngineAdapters:
    """slots: the policy, which the scheduler asks."""

    def __init__(self, runner: ModelRunner, tp: TensorParallel, adapters: RankAdapters) -> None:
        self.slots = AdapterSlots(adapters.num_slots)
        self._runner = runner
        self._tp = tp
        self._here = adapters
        self._unloaded: set[str] = set()

    def __contains__(self, revision: object) -> bool:
        """Whether requests may name it."""
        return revision in self._here

    @property
    def has_unloaded(self) -> bool:
        """Whether some are to go once no request uses them."""
        return bool(self._unloaded)

    def unload(self, revision: str) -> None:
        """It is to go, see `forget_unused`."""
        self._unloaded.add(revision)

    def forget_unused(self, in_use: set[str | None]) -> None:
        """Those that were unloaded, and not loaded again, leave all ranks. in_use: what requests name."""
        for revision in self._unloaded - in_use:
            self._unloaded.discard(revision)
            if revision not in self._here:
                self.slots.remove(revision)
                self._tell(NO_SLOT, revision)

    def put_new(self) -> set[str]:
        """Brings the slots that changed to all ranks. Returns the adapters that a rank does not have."""
        return {new.adapter for new in self.slots.take_new() if not self._tell(new.slot, new.adapter)}

    def _tell(self, slot: int, revision: str) -> bool:
        key = adapter_key(revision)
        if self._tp.size > 1:
            self._tp.broadcast(adapter_message(slot, key))
        return self._runner.put_adapter(slot, key)
