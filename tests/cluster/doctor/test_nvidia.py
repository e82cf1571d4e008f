"""The output of nvidia-smi becomes facts: recorded answers, errors, and nonsense. Needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.doctor.amounts import MIB
from cluster.doctor.facts import GpuProcess, Nvidia
from cluster.doctor.nvidia import GPU_FIELDS, PROCESS_FIELDS, read_nvidia

# As drivers of the 550 series answer on a g5.12xlarge; the third GPU is in use.
A10G = """\
0, NVIDIA A10G, GPU-6d3a2c6c-6b7e-2c05-8e5b-0b8a3f0e1a10, 550.90.07, 23028, 22731, 8.6, Default, [N/A]
1, NVIDIA A10G, GPU-6d3a2c6c-6b7e-2c05-8e5b-0b8a3f0e1a11, 550.90.07, 23028, 1337, 8.6, Default, [N/A]
"""
A100_MIG = "0, NVIDIA A100-SXM4-40GB, GPU-0f1e, 535.183.01, 40960, [N/A], 8.0, Default, Enabled\n"


class Smi:
    """nvidia-smi: `gpus` and `processes` are its answers; an exception is raised instead."""

    def __init__(self, gpus, processes="") -> None:
        self._answers = {
            "--query-gpu=" + ",".join(GPU_FIELDS): gpus,
            "--query-compute-apps=" + ",".join(PROCESS_FIELDS): processes,
        }

    def __call__(self, command):
        program, query, form = command
        assert (program, form) == ("nvidia-smi", "--format=csv,noheader,nounits")
        answer = self._answers[query]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def dev(tmp_path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


def test_two_a10g_one_of_them_in_use(dev):
    processes = "GPU-6d3a2c6c-6b7e-2c05-8e5b-0b8a3f0e1a11, 99999999, /usr/bin/python, 3.11\n"
    found = read_nvidia(Smi(A10G, processes), dev=dev)
    assert (found.num_devices, found.driver, found.failure) == (2, "550.90.07", None)
    idle, busy = found.gpus
    assert (idle.index, idle.name, idle.compute_capability) == (0, "NVIDIA A10G", (8, 6))
    assert (idle.total_bytes, idle.free_bytes) == (23028 * MIB, 22731 * MIB)
    assert (idle.compute_mode, idle.is_mig, idle.processes) == ("Default", False, ())
    assert busy.free_bytes == 1337 * MIB
    assert busy.processes == (GpuProcess(pid=99999999, name="/usr/bin/python, 3.11"),)


def test_a_worker_of_ray_is_named_by_its_actor(dev):
    code = "print(flush=True); input()"
    command = ["ray::RankActor", "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, executable=sys.executable, **pipes) as worker:
        worker.stdout.readline()
        uuid = "GPU-6d3a2c6c-6b7e-2c05-8e5b-0b8a3f0e1a10"
        answer = f"{uuid}, {worker.pid}, /usr/bin/python3\n{uuid}, {os.getpid()}, /usr/bin/other\n"
        found = read_nvidia(Smi(A10G, answer), dev=dev)
        worker.communicate(b"\n")
    assert [p.name for p in found.gpus[0].processes] == ["ray::RankActor", "/usr/bin/other"]


def test_values_that_are_not_available_are_none():
    (gpu,) = read_nvidia(Smi(A100_MIG)).gpus
    assert gpu.is_mig and gpu.free_bytes is None and gpu.total_bytes == 40960 * MIB


def test_processes_that_cannot_be_listed_are_none(dev):
    assert read_nvidia(Smi(A10G, subprocess.TimeoutExpired("nvidia-smi", 20)), dev=dev).gpus[1].processes == ()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            subprocess.CalledProcessError(
                9, "nvidia-smi", "NVIDIA-SMI has failed because it couldn't\ncommunicate", ""
            ),
            "communicate",
        ),
        (subprocess.CalledProcessError(6, "nvidia-smi", "No devices were found", ""), "No devices were found"),
        (subprocess.TimeoutExpired("nvidia-smi", 20), "timed out"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        ("No devices were found\n", "No devices were found"),
        ("x, NVIDIA A10G, GPU-0, 550.90.07, 23028, 22731, 8.6, Default, [N/A]\n", "invalid literal"),
    ],
)
def test_a_broken_driver_is_reported_in_its_own_words(dev, answer, said):
    found = read_nvidia(Smi(answer), dev=dev)
    assert found.gpus == () and found.num_devices == 2
    assert found.failure is not None and said in found.failure and "\n" not in found.failure


def test_without_nvidia_smi_there_is_no_failure(tmp_path):
    assert read_nvidia(Smi(FileNotFoundError(2, "No such file")), dev=tmp_path) == Nvidia()
