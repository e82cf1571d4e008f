"""The GPUs of this machine, as nvidia-smi reports them, which comes with the driver. Knows its CSV; judges nothing, imports no torch."""

import contextlib
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cluster.doctor.amounts import MIB
from cluster.doctor.facts import Gpu, GpuProcess, Nvidia

GPU_FIELDS = (
    "index",
    "name",
    "uuid",
    "driver_version",
    "memory.total",
    "memory.free",
    "compute_cap",
    "compute_mode",
    "mig.mode.current",
)
PROCESS_FIELDS = ("gpu_uuid", "pid", "process_name")
TIMEOUT_S = 20.0  # without persistence mode the driver wakes each GPU first

Run = Callable[[Sequence[str]], str]


def read_nvidia(run: Run | None = None, *, dev: Path = Path("/dev")) -> Nvidia:
    """run: runs a command and returns its stdout; raises OSError or subprocess.SubprocessError. Tests pass their own."""
    run = run or _run
    num_devices = sum(path.name.removeprefix("nvidia").isdigit() for path in dev.glob("nvidia[0-9]*"))
    try:
        answer = run(["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"])
    except FileNotFoundError:
        return Nvidia(num_devices=num_devices)
    except subprocess.CalledProcessError as e:
        output = " ".join(f"{e.stdout or ''} {e.stderr or ''}".split())
        return Nvidia(num_devices=num_devices, failure=f"nvidia-smi exited with code {e.returncode}: {output}")
    except (OSError, subprocess.TimeoutExpired) as e:
        return Nvidia(num_devices=num_devices, failure=f"nvidia-smi did not answer: {e}")
    try:
        rows = list(_rows(answer, GPU_FIELDS))
        processes = _processes(run)
        gpus = tuple(_gpu(row, processes[row["uuid"]]) for row in rows)
    except ValueError as e:
        return Nvidia(num_devices=num_devices, failure=f"the output of nvidia-smi could not be parsed: {e}")
    return Nvidia(num_devices=num_devices, driver=rows[0]["driver_version"] if rows else None, gpus=gpus)


def _gpu(row: dict[str, str], processes: list[GpuProcess]) -> Gpu:
    capability = _known(row["compute_cap"])
    major, _, minor = (capability or "").partition(".")
    return Gpu(
        index=int(row["index"]),
        name=row["name"],
        uuid=row["uuid"],
        total_bytes=_mebibytes(row["memory.total"]),
        free_bytes=_mebibytes(row["memory.free"]),
        compute_capability=None if capability is None else (int(major), int(minor)),
        compute_mode=_known(row["compute_mode"]),
        is_mig=row["mig.mode.current"] == "Enabled",
        processes=tuple(processes),
    )


def _processes(run: Run) -> dict[str, list[GpuProcess]]:
    """By GPU. Inside a container nvidia-smi does not see other processes, so an empty list proves nothing."""
    found: dict[str, list[GpuProcess]] = defaultdict(list)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = run(
            ["nvidia-smi", f"--query-compute-apps={','.join(PROCESS_FIELDS)}", "--format=csv,noheader,nounits"]
        )
        for row in _rows(answer, PROCESS_FIELDS):
            pid = int(row["pid"])
            found[row["gpu_uuid"]].append(GpuProcess(pid=pid, name=_ray_title(pid) or row["process_name"]))
    return found


def _rows(answer: str, fields: Sequence[str]) -> Iterator[dict[str, str]]:
    """Raises ValueError for a line without one value per field, such as an error message."""
    for line in answer.splitlines():
        if not line.strip():
            continue
        values = [value.strip() for value in line.split(",", len(fields) - 1)]
        if len(values) != len(fields):
            raise ValueError(line.strip())
        yield dict(zip(fields, values, strict=True))


def _known(value: str) -> str | None:
    return None if value in ("", "[N/A]", "N/A", "[Not Supported]", "[Unknown Error]") else value


def _mebibytes(value: str) -> int | None:
    return None if (known := _known(value)) is None else int(known) * MIB


def _ray_title(pid: int) -> str | None:
    """The title of a Ray worker, which is its actor's class. None for other processes and for pids of another namespace."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return None
    return title if title.startswith("ray::") else None


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
