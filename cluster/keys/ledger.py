"""The usage of each key, by day, model and endpoint: an SQLite file next to the keys file, shared by the gateways of a host.

Entries are summed in memory and written every few seconds by a thread, never on the event loop; a crash loses the entries since the last
write. If the ledger cannot be written (full disk, read-only folder), the log says so and requests are not affected: the sums are kept
until it can be written again.
"""

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from workers.errors import ConfigError

log = logging.getLogger(__name__)

FLUSH_EVERY_S = 5.0
MAX_PENDING = 100_000  # sums that wait while the ledger cannot be written; new ones beyond that are lost
BUSY_TIMEOUT_S = 5.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, key_id TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL, key_name TEXT NOT NULL,
    requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, errors INTEGER NOT NULL,
    PRIMARY KEY (day, key_id, model, endpoint)
) WITHOUT ROWID
"""
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (day, key_id, model, endpoint) DO UPDATE SET
    key_name = excluded.key_name, requests = requests + excluded.requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens, errors = errors + excluded.errors
"""
_READ = """
SELECT day, key_id, model, endpoint, key_name, requests, prompt_tokens, cached_tokens, completion_tokens, errors
FROM usage WHERE day >= ? ORDER BY day, key_name, model, endpoint
"""


@dataclass(frozen=True)
class Group:
    """The key of a sum. `day`: UTC, like 2026-01-31. `model`: "" if the request named no served model."""

    day: str
    key_id: str
    model: str
    endpoint: str
    key_name: str


@dataclass
class Sums:
    """`errors`: requests that were refused or failed; `requests` includes them."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    errors: int = 0

    def add(self, other: "Sums") -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.errors += other.errors

    def values(self) -> tuple[int, ...]:
        return self.requests, self.prompt_tokens, self.cached_tokens, self.completion_tokens, self.errors


class Ledger:
    """Call `add` on the event loop, `run` as a task, finally `close`. The first write creates the file."""

    def __init__(self, path: Path, *, flush_every_s: float = FLUSH_EVERY_S) -> None:
        self._path = path
        self._flush_every_s = flush_every_s
        self._lock = threading.Lock()
        self._pending: dict[Group, Sums] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._connection: sqlite3.Connection | None = None
        self._failing = False
        self._closed = False

    def add(self, group: Group, sums: Sums) -> None:
        """Adds to a sum in memory: one dictionary look-up."""
        with self._lock:
            known = self._pending.get(group)
            if known is not None:
                known.add(sums)
            elif len(self._pending) < MAX_PENDING:
                self._pending[group] = sums

    async def run(self) -> None:
        """Writes every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(self._flush_every_s)
            await self.flush()

    async def flush(self) -> None:
        """Writes all that was added; if that fails, logs the reason."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write)

    async def close(self) -> None:
        """Writes what is left and closes the file. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
        self._thread.shutdown()

    def _write(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        if not pending:
            return
        rows = [(g.day, g.key_id, g.model, g.endpoint, g.key_name, *s.values()) for g, s in pending.items()]
        try:
            if self._connection is None:
                self._connection = _open(self._path)
            with self._connection:
                self._connection.executemany(_ADD, rows)
        except (sqlite3.Error, OSError) as e:
            if not self._failing:
                log.error("The usage ledger cannot be written: %s. Usage is kept in memory until it can be.", e)
            self._failing = True
            for group, sums in pending.items():
                self.add(group, sums)
            return
        if self._failing:
            self._failing = False
            log.warning("The usage ledger can be written again.")

    def _end(self) -> None:
        self._write()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def ledger_path(keys_path: Path) -> Path:
    """Next to the keys file: keys.usage.db for keys.json."""
    return keys_path.with_suffix(".usage.db")


def today() -> str:
    """The current day in UTC."""
    return datetime.now(UTC).date().isoformat()


def read_usage(path: Path, *, days: int | None = None) -> list[tuple[Group, Sums]]:
    """The sums of the last `days` days, including today; None: of all days. Empty without a ledger.

    Raises ConfigError if it cannot be read.
    """
    if not path.exists():
        return []
    since = "" if days is None else (datetime.now(UTC).date() - timedelta(days=days - 1)).isoformat()
    try:
        with closing(_open(path)) as connection:
            return [(Group(*row[:5]), Sums(*row[5:])) for row in connection.execute(_READ, (since,))]
    except sqlite3.Error as e:
        raise ConfigError(f"The usage ledger {path} cannot be read: {e}.") from e


def totals(usage: Sequence[tuple[Group, Sums]]) -> dict[str, Sums]:
    """Totals by key id."""
    found: dict[str, Sums] = {}
    for group, sums in usage:
        found.setdefault(group.key_id, Sums()).add(sums)
    return found


def _open(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)  # otherwise SQLite would create it with the umask's permissions
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
    try:
        # With WAL, readers and writers in several processes do not wait for each other, and a crash loses no committed transaction.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(_SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection
