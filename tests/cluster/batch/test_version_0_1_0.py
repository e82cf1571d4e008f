"""Stores, keys and specs that version 0.1.0 wrote are read, or refused with a clear message."""

import logging
import sqlite3
import time

import msgspec
from support.batch.batches import FAST, SimulatedExecutor, read_lines
from support.batch.version_0_1_0 import BATCH_ID, FIXTURES, copy_job, copy_keys

from cluster.batch.run.runner import run_batch
from cluster.batch.store.database import MIGRATIONS
from cluster.batch.store.open import SQLITE_NAME, open_files, open_store
from cluster.controller import spec_store
from cluster.keys.file import read_keys
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Group, Sums, ledger_path, read_usage
from cluster.ray_runtime.internals import KeyValueStore
from cluster.system.process import is_dead, new_owner

SECRET = "tm-JUpZZwcgmk85xw5QusKs9jPVsejEUsORADJrtonLkbA"  # of the key team-a


async def test_a_store_is_opened(tmp_path):
    store = open_store(copy_job(tmp_path))
    batch = await store.get_batch(BATCH_ID)
    assert (batch.status, batch.num_lines, batch.num_completed, batch.num_failed) == ("in_progress", 12, 2, 1)
    assert [(x.number, x.crashes, x.lone_crashes) for x in await store.suspects(BATCH_ID)] == [(10, 1, 0), (11, 1, 0)]
    pending = await store.pending_lines(BATCH_ID, after=0, limit=100)
    assert sorted(x.number for x in pending) == [1, 2, 3, 6, 8, 9, 12]
    answered = {line.number: result for line, result in await store.answered(BATCH_ID, after=0, limit=100) if result}
    assert {number: result.status_code for number, result in answered.items()} == {4: 400, 5: 200, 7: 200}
    await store.close()


async def test_a_batch_is_continued(tmp_path):
    """The lease of its dead runner does not block it, and the answers it had stay as they were."""
    folder = copy_job(tmp_path)
    store, files = open_store(folder), open_files(folder)
    before = {line.number: result for line, result in await store.answered(BATCH_ID, after=0, limit=100) if result}
    executor = SimulatedExecutor()
    ended = await run_batch(store, files, executor, BATCH_ID, options=FAST)
    assert (ended.status, ended.num_completed, ended.num_failed) == ("completed", 11, 1)
    assert len(executor.executed) == 9
    output, errors = read_lines(files, ended.output_file_id), read_lines(files, ended.error_file_id)
    assert [x["custom_id"] for x in output] == [f"row-{i}" for i in range(12) if i != 3]
    assert [x["custom_id"] for x in errors] == ["row-3"]
    by_id = {x["custom_id"]: x["response"]["body"] for x in output + errors}
    assert {n: by_id[f"row-{n - 1}"] for n in before} == {n: msgspec.json.decode(r.body) for n, r in before.items()}
    await store.close()


async def test_a_lease_on_another_host_is_respected_while_it_lasts(tmp_path):
    """Owners are written the same way: "host/boot id/pid namespace/pid/start time/name"."""
    folder = copy_job(tmp_path)
    with sqlite3.connect(folder / SQLITE_NAME) as db:
        [(owner,)] = db.execute("SELECT lease_owner FROM batches").fetchall()
        db.execute("UPDATE batches SET lease_expires_at = ?", (time.time() + 60,))
    db.close()
    assert len(owner.split("/")) == len(new_owner().split("/"))
    store = open_store(folder)
    assert await store.acquire(new_owner(), ttl_s=9, now=time.time(), is_dead=is_dead) is None
    assert await store.acquire(new_owner(), ttl_s=9, now=time.time() + 120, is_dead=is_dead) is not None
    await store.close()


def test_the_schema_is_one_that_migrations_start_from(tmp_path):
    """Version 0.1.0 wrote schema 2: a migration that is changed instead of added would break its stores."""
    with sqlite3.connect(copy_job(tmp_path) / SQLITE_NAME) as old:
        columns = {
            table: old.execute(f"PRAGMA table_info({table})").fetchall()
            for (table,) in old.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
            if not table.startswith("sqlite_")
        }
        assert old.execute("PRAGMA user_version").fetchone() == (2,)
    old.close()
    new = sqlite3.connect(":memory:")
    for statement in (statement for migration in MIGRATIONS[:2] for statement in migration):
        new.execute(statement.format(key="INTEGER PRIMARY KEY", bytes="BLOB", clustered=" WITHOUT ROWID"))
    assert {table: new.execute(f"PRAGMA table_info({table})").fetchall() for table in columns} == columns
    new.close()


def test_an_api_keys_file_is_read(tmp_path):
    path = copy_keys(tmp_path)
    team, operator = read_keys(path)
    assert (team.name, team.admin, operator.name, operator.admin) == ("team-a", False, "ops", True)
    assert (team.limits.requests_per_minute, team.limits.tokens_per_minute) == (60, 5000)
    assert (team.limits.max_concurrency, team.limits.models, team.limits.priority) == (4, ("demo_model",), 1)
    assert Keyring(path=path).find(SECRET) == team


def test_a_usage_ledger_is_read(tmp_path):
    path = copy_keys(tmp_path)
    key_id = read_keys(path)[0].id
    assert read_usage(ledger_path(path)) == [
        (Group("2026-01-31", key_id, "demo_model", "/v1/completions", "team-a"), Sums(3, 30, 16, 12, 1)),
        (Group("2026-02-01", key_id, "demo_model", "/v1/embeddings", "team-a"), Sums(1, 7, 0, 0, 0)),
    ]


def test_a_spec_is_ignored_with_a_warning(monkeypatch, caplog):
    """Its pickle names classes by modules that have moved. The controller then uses the spec that it was created with."""
    saved = (FIXTURES / "spec" / "spec.pickle").read_bytes()
    monkeypatch.setattr(KeyValueStore, "get", lambda store, key: saved)
    with caplog.at_level(logging.WARNING):
        assert spec_store.load_spec("default") is None
    assert "was written by another version and is ignored" in caplog.text
