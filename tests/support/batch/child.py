"""Runs one batch of a data directory with the simulated executor and prints how it ended. Tests kill, stop and starve it.

python child.py FOLDER BATCH_ID [--latency-s S] [--file-limit BYTES] [--lease-ttl-s S]
python child.py FOLDER BATCH_ID --lives SEED [--life-s S]    kills itself again and again, until the batch has ended
"""

import argparse
import asyncio
import os
import random
import resource
import signal
import sqlite3
import sys
import time
from dataclasses import replace
from pathlib import Path

from cluster.batch.errors import BatchError, LeaseLostError
from cluster.batch.run.runner import run_batch
from cluster.batch.store.open import open_files, open_store
from support.batch.batches import FAST, SimulatedExecutor


async def run(args: argparse.Namespace) -> str:
    store, files = open_store(args.folder, database_url=args.database_url), open_files(args.folder)
    executor = SimulatedExecutor(latency_s=args.latency_s, capacity=16)
    options = replace(FAST, lease_ttl_s=args.lease_ttl_s)
    try:
        ended = await run_batch(store, files, executor, args.batch_id, options=options)
    except LeaseLostError:
        return "lease lost"
    except BatchError as e:
        return f"failed: {e}"
    finally:
        await store.close()
    return ended.status


def lives(args: argparse.Namespace) -> None:
    """Forks a child for each life, so that Python starts only once. Prints the status of the batch at each death."""
    chance, life_s = random.Random(args.lives), args.life_s
    while True:
        life_s *= 1.05  # so that one life is long enough in the end, on a busy machine too
        pid = os.fork()
        if pid == 0:
            print(asyncio.run(run(args)), flush=True)
            os._exit(0)
        time.sleep(chance.uniform(0, life_s))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0, f"a life ended with {status}"
            return
        print(f"killed: {_status(args)}", flush=True)


def _status(args: argparse.Namespace) -> str:
    if args.database_url is not None:
        import psycopg

        with psycopg.connect(args.database_url) as server:
            return server.execute("SELECT status FROM batches").fetchone()[0]
    connection = sqlite3.connect(args.folder / "batches.db")
    try:
        return connection.execute("SELECT status FROM batches").fetchone()[0]
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("batch_id")
    parser.add_argument("--latency-s", type=float, default=0.004)
    parser.add_argument("--file-limit", type=int)
    parser.add_argument("--lease-ttl-s", type=float, default=30.0)
    parser.add_argument("--database-url")
    parser.add_argument("--lives", type=int)
    parser.add_argument("--life-s", type=float, default=0.1)
    args = parser.parse_args()
    random.seed(0)
    if args.file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (args.file_limit, args.file_limit))
    if args.lives is not None:
        lives(args)
    else:
        print(asyncio.run(run(args)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
