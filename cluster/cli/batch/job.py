"""A command's batch on this machine: the folder beside its output that remembers it, so that any death can be followed by `resume`.

The folder holds `batch.json` (what was asked, which batch it is, how it ended), a lock, and, where no server keeps them, the store and the
files. Knows no Ray, no HTTP and no lines. What is written is renamed into place; one process at a time holds the lock.
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

from cluster.batch.errors import BatchError, StoreError
from cluster.cli.batch.locations import STANDARD, is_address, local_path
from workers.errors import ConfigError

FOLDER_SUFFIX = ".tramontane"
_JOB, _LOCK = "batch.json", "lock"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch ended, once its output is where it belongs."""

    status: str
    num_lines: int
    num_completed: int
    num_failed: int
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    ended_at: float = 0.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. `request`: the options that say which answers are wanted; `options`: those that say where they are computed.

    `url`: the server that runs it, None where the command does. `batch_id` and `input_file_id` are None until they exist; the command's
    own batches have them from the beginning. `run_id` names the run on a server and in Ray. `source_version`: of a local file, what
    changes with its contents. `source_bytes`: where the job is a part, its input's size, which all parts must agree on.
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
        """Its name in Ray."""
        return f"batch-{self.run_id}"


class JobFolder:
    """One job's folder. `hold` it while something is done for the job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Job | None:
        """None where there is no job. Raises StoreError for one that cannot be read."""
        try:
            return msgspec.json.decode((self.path / _JOB).read_bytes(), type=Job)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as e:
            raise StoreError(
                f"{self.path / _JOB} cannot be read ({e}); use the release that wrote it, or start the batch anew."
            ) from e

    def write(self, job: Job) -> None:
        """Raises StoreError."""
        temporary = self.path / f"{_JOB}.new"
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with temporary.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(job)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / _JOB)
        except OSError as e:
            raise StoreError(
                f"The batch's folder {self.path} cannot be written: {e.strerror}. Nothing that was stored is lost."
            ) from e

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Raises BatchError while another process does, and StoreError for a folder that cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = (self.path / _LOCK).open("a")
        except OSError as e:
            raise StoreError(
                f"The batch's folder {self.path} cannot be made or written ({e.strerror}); choose another with --state-dir."
            ) from e
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            except OSError as e:
                raise BatchError(
                    "Another process works on this batch; see `tramontane batch status`, or wait for it."
                ) from e
            yield

    @property
    def is_held(self) -> bool:
        """Whether a living process works on it."""
        try:
            with self.hold():
                return False
        except StoreError:  # nobody who could write would work on what cannot be written
            return False
        except BatchError:
            return True

    def clear(self, *, keep_job: bool) -> None:
        """Removes the store, the files and, unless it shall be kept, what tells of the job. Raises StoreError."""
        try:
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif not (keep_job and entry.name in (_JOB, _LOCK)):  # whoever holds the lock still does
                    entry.unlink(missing_ok=True)
            if not keep_job:
                self.path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as e:
            raise StoreError(f"The batch's folder {self.path} cannot be emptied: {e.strerror}.") from e


def new_job(**fields: Any) -> Job:
    """With a run id and, unless it is given, the time."""
    return Job(**{"run_id": uuid.uuid4().hex[:12], "created_at": time.time(), **fields})


def folder_for(output: str, state_dir: Path | None) -> JobFolder:
    """Where the job of this output is: beside a local file; for others in XDG_STATE_HOME, under a name made of the output's."""
    if state_dir is not None:
        return JobFolder(state_dir.expanduser().absolute())
    if output != STANDARD and not is_address(output):
        path = local_path(output).absolute()
        return JobFolder(path.with_name(path.name + FOLDER_SUFFIX))
    name = uuid.uuid4().hex[:12] if output == STANDARD else hashlib.sha256(output.encode()).hexdigest()[:12]
    return JobFolder(_state_home() / "batches" / name)


def find_job(target: str, state_dir: Path | None) -> tuple[JobFolder, Job]:
    """`target`: an output, or a job's folder. Raises ConfigError where there is none."""
    as_folder = JobFolder(local_path(target).absolute())
    folders = [as_folder, folder_for(target, state_dir)] if state_dir is None else [folder_for(target, state_dir)]
    for folder in folders:
        if (job := folder.read() if folder.path.is_dir() else None) is not None:
            return folder, job
    raise ConfigError(f"No batch with the output {target} is known here; start it with `tramontane batch run`.")


def version_of(source: str) -> str | None:
    """Changes when a local file does; None where nothing is known."""
    if source == STANDARD or is_address(source):
        return None
    try:
        stat = local_path(source).stat()
    except OSError:
        return None
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _state_home() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tramontane"
