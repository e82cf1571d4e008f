"""The ledger: sums over days, keys and processes, a crash, and a disk that cannot be written."""

import asyncio
import multiprocessing
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.keys import ledger as ledger_module
from cluster.keys.ledger import Group, Ledger, Sums, ledger_path, read_usage, today, totals
from workers.errors import ConfigError


def group(key: str = "key-1", day: str | None = None, endpoint: str = "/v1/completions") -> Group:
    return Group(day or today(), key, "demo", endpoint, key)


async def test_sums_by_day_key_model_and_endpoint(tmp_path: Path) -> None:
    path = tmp_path / "keys.usage.db"
    assert read_usage(path) == []
    for _ in range(2):  # two runs of a server
        ledger = Ledger(path)
        for _ in range(3):
            ledger.add(group(), Sums(1, 10, 2, 5, 0))
        ledger.add(group(endpoint="/v1/embeddings"), Sums(1, 7, 0, 0, 1))
        ledger.add(group("key-2", day="2020-01-01"), Sums(1, 1, 1, 1, 1))
        await ledger.flush()
        ledger.add(group(), Sums(1))
        await ledger.close()
        await ledger.close()
    usage = dict(read_usage(path))
    assert usage[group()] == Sums(8, 60, 12, 30, 0)
    assert totals(list(usage.items()))["key-1"] == Sums(10, 74, 12, 30, 2)
    assert set(dict(read_usage(path, days=1))) == {group(), group(endpoint="/v1/embeddings")}
    days = (datetime.now(UTC).date() - datetime(2020, 1, 1, tzinfo=UTC).date()) // timedelta(days=1)
    assert len(read_usage(path, days=days)) == 2 and len(read_usage(path, days=days + 1)) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def write_then_die(path: Path, number: int) -> None:
    async def main() -> None:
        ledger = Ledger(path)
        for _ in range(50):
            ledger.add(group(), Sums(requests=1))
            await ledger.flush()
        ledger.add(group(), Sums(requests=1000))
        os._exit(number)  # what was not flushed is lost, and nothing else

    asyncio.run(main())


def test_gateways_share_the_ledger_and_a_crash_keeps_what_was_flushed(tmp_path: Path) -> None:
    path = tmp_path / "u.db"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_then_die, args=(path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 1, 2]
    assert read_usage(path) == [(group(), Sums(requests=150))]


async def test_an_unwritable_disk_is_logged_once_and_loses_no_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "missing" / "u.db"
    ledger = Ledger(path)
    for _ in range(3):
        ledger.add(group(), Sums(requests=1))
        await ledger.flush()
    assert caplog.text.count("cannot be written") == 1
    monkeypatch.setattr(ledger_module, "MAX_PENDING", 1)
    ledger.add(group("key-2"), Sums(requests=1))
    path.parent.mkdir()
    await ledger.flush()
    assert "can be written again" in caplog.text
    assert read_usage(path) == [(group(), Sums(requests=3))]
    await ledger.close()


async def test_run_writes_periodically(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "u.db", flush_every_s=0.01)
    task = asyncio.create_task(ledger.run())
    ledger.add(group(), Sums(requests=1))
    async with asyncio.timeout(10):
        while not read_usage(tmp_path / "u.db"):
            await asyncio.sleep(0.01)
    task.cancel()
    await ledger.close()


async def test_a_file_that_is_not_a_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "u.db"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_usage(path)
    ledger = Ledger(path)
    ledger.add(group(), Sums(requests=1))
    await ledger.close()
    assert "cannot be written: file is not a database" in caplog.text
    assert path.read_bytes() == b"no database" * 100


def test_the_ledger_is_next_to_the_keys_file() -> None:
    assert ledger_path(Path("/a/keys.json")) == Path("/a/keys.usage.db")
