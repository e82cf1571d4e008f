"""Memory does not grow with the lines: what Python holds at its most while a batch runs, for one size and for ten times as many."""

import tracemalloc

from batches import SimulatedExecutor, add_batch, opened, requests

from cluster.batch.runner import run_batch


async def peak_bytes(folder, num_lines: int) -> int:
    store, files = opened(folder)
    batch = await add_batch(store, files, requests(num_lines))
    executor = SimulatedExecutor()
    executor.executed = executor.together = _Nothing()
    tracemalloc.start()
    try:
        ended = await run_batch(store, files, executor, batch.id)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (ended.status, ended.num_completed) == ("completed", num_lines)
    await store.close()
    return peak


class _Nothing(list):
    def append(self, _) -> None:
        pass


async def test_twenty_thousand_lines(tmp_path):
    small, large = await peak_bytes(tmp_path / "a", 2_000), await peak_bytes(tmp_path / "b", 20_000)
    assert large < 1.5 * small + 4 * 2**20, f"2,000 lines take {small:,} bytes, 20,000 take {large:,}"
