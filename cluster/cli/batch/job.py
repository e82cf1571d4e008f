"""The job of a batch command: a folder next to the output that remembers it, so that `resume` can continue after any interruption.

The folder holds `batch.json` (the options, the batch's id, how it ended), a lock and, unless a server has them, the store and the files.
Knows no Ray, no HTTP and no lines. `batch.json` is replaced atomically; one process at a time has the lock.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cluster.batch.errors import NOTHING_LOST, BatchError, StoreError
from cluster.cli.batch.locations import STANDARD, is_address, local_path
from cluster.system.files import replace_file
from workers.errors import ConfigError

FOLDER_SUFFIX = ".tramontane"
_JOB, _LOCK = "batch.json", "lock"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch ended, recorded once its output is in place."""

    status: str
    num_lines: int
    num_completed: int
    num_failed: int
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    ended_at: float = 0.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What was requested. `request`: the options that decide which answers are computed; `options`: those that decide where.

    `url`: the server that runs it; None if the command does. `batch_id` and `input_file_id` are None until they exist, which is from the
    start unless a server runs the batch. `run_id` names the run on a server and in Ray. `source_version`: changes when a local input file
    changes. `source_bytes`: for a part, the size of its input, which must be the same for all parts.
    """

    run_id: str
    source: str
    source_version: str | None
    source_bytes: int | None = None
    output: str
    errors: str
    request: dict[str, Any]
    options: dict[str, Any]
    url: str | None = None
    batch_id: str | None = None
    input_file_id: str | None = None
    created_at: float = 0.0
    outcome: Outcome | None = None
    schema: int = 1

    @property
    def deployment(self) -> str:
        """The deployment's name in Ray."""
        return f"batch-{self.run_id}"


class JobFolder:
    """The folder of one job. Take its `lock` to work on the job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Job | None:
        """The job, or None. Raises StoreError for one that cannot be read."""
        try:
            return msgspec.json.decode((self.path / _JOB).read_bytes(), type=Job)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as e:
            raise StoreError(
                f"{self.path / _JOB} cannot be read: {e}.",
                remedy="Use the release that wrote it, or start over with `tramontane batch run --overwrite`.",
            ) from e

    def write(self, job: Job) -> None:
        """Raises StoreError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(self.path / _JOB, msgspec.json.format(msgspec.json.encode(job)) + b"\n")
        except OSError as e:
            raise StoreError(
                f"The folder {self.path} of the batch cannot be written: {e.strerror}.", remedy=NOTHING_LOST
            ) from e

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the job. Raises BatchError while another process has the lock, and StoreError for a folder that cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = (self.path / _LOCK).open("a")
        except OSError as e:
            raise StoreError(
                f"The folder {self.path} of the batch cannot be created or written: {e.strerror}.",
                remedy="Choose another folder with --state-dir.",
                param="--state-dir",
            ) from e
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when the process ends
            except OSError as e:
                raise BatchError(
                    "Another process is working on this batch.",
                    remedy="Wait for it, or see its progress with `tramontane batch status`.",
                ) from e
            yield

    @property
    def is_locked(self) -> bool:
        """Whether a live process is working on the job."""
        try:
            with self.lock():
                return False
        except StoreError:  # no process can work on a folder that cannot be written
            return False
        except BatchError:
            return True

    def clear(self, *, keep_job: bool) -> None:
        """Removes the store, the files and, unless `keep_job`, the job and its folder. Raises StoreError."""
        try:
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif not (keep_job and entry.name in (_JOB, _LOCK)):  # the process that calls this has the lock
                    entry.unlink(missing_ok=True)
            if not keep_job:
                self.path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as e:
            raise StoreError(f"The folder {self.path} of the batch cannot be emptied: {e.strerror}.") from e


def new_job(**fields: Any) -> Job:
    """A job with a new run id, created now unless `fields` say otherwise."""
    return Job(**{"run_id": uuid.uuid4().hex[:12], "created_at": time.time(), **fields})


def folder_for(output: str, state_dir: Path | None) -> JobFolder:
    """The job folder of this output: next to a local file; otherwise in XDG_STATE_HOME, under a hash of the output's address."""
    if state_dir is not None:
        return JobFolder(state_dir.expanduser().absolute())
    if output != STANDARD and not is_address(output):
        path = local_path(output).absolute()
        return JobFolder(path.with_name(path.name + FOLDER_SUFFIX))
    name = uuid.uuid4().hex[:12] if output == STANDARD else hashlib.sha256(output.encode()).hexdigest()[:12]
    return JobFolder(_state_home() / "batches" / name)


def find_job(target: str, state_dir: Path | None) -> tuple[JobFolder, Job]:
    """target: an output, or the folder of a job. Raises ConfigError if there is no job."""
    as_folder = JobFolder(local_path(target).absolute())
    folders = [as_folder, folder_for(target, state_dir)] if state_dir is None else [folder_for(target, state_dir)]
    for folder in folders:
        if (job := folder.read() if folder.path.is_dir() else None) is not None:
            return folder, job
    raise ConfigError(
        f"No batch with the output {target} is known on this machine.", remedy="Start it with `tramontane batch run`."
    )


def version_of(source: str) -> str | None:
    """A string that changes when a local file changes; None for other sources."""
    if source == STANDARD or is_address(source):
        return None
    try:
        stat = local_path(source).stat()
    except OSError:
        return None
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _state_home() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tramontane"
