"""Copies of the files in tests/cluster/batch/fixtures/v0_1_0, which version 0.1.0 wrote, with paths that fit the copy."""

import gzip
import os
import shutil
from pathlib import Path

from support.paths import ROOT

FIXTURES = ROOT / "tests" / "cluster" / "batch" / "fixtures" / "v0_1_0"
OLD_FOLDER = "/srv/job"
BATCH_ID = "batch_cfe3a589f86749beaefd6a63efb99a45"
INPUT_MTIME_NS = 1796015658064294112  # of job/in.jsonl, as the job file has it


def copy_job(folder: Path) -> Path:
    """in.jsonl and the job folder of out.jsonl, which is returned."""
    job = folder / "out.jsonl.tramontane"
    shutil.copytree(FIXTURES / "job", job)
    (job / "in.jsonl").rename(folder / "in.jsonl")
    os.utime(folder / "in.jsonl", ns=(INPUT_MTIME_NS, INPUT_MTIME_NS))
    _unpack(job / "batches.db.gz")
    _move_paths(job / "batch.json", folder)
    return job


def copy_parts(folder: Path) -> None:
    """parts.jsonl, and both parts of parts.out.jsonl."""
    shutil.copytree(FIXTURES / "parts", folder, dirs_exist_ok=True)
    for record in folder.glob("*.done"):
        _move_paths(record, folder)


def copy_server_job(folder: Path, *, url: str) -> None:
    """The job folder of remote.jsonl, whose batch is on the server at this URL."""
    job = folder / "remote.jsonl.tramontane"
    shutil.copytree(FIXTURES / "server", job)
    _move_paths(job / "batch.json", folder)
    file = job / "batch.json"
    file.write_text(file.read_text().replace("http://127.0.0.1:8000", url))


def copy_keys(folder: Path) -> Path:
    """The API keys file, which is returned, and its ledger."""
    shutil.copytree(FIXTURES / "keys", folder, dirs_exist_ok=True)
    _unpack(folder / "keys.usage.db.gz")
    return folder / "keys.json"


def _unpack(path: Path) -> None:
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


def _move_paths(file: Path, folder: Path) -> None:
    file.write_text(file.read_text().replace(OLD_FOLDER, str(folder)))
