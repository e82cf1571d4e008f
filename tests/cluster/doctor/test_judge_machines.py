"""Findings about one node: GPUs, memory, shared memory, disks. Tables of facts; every finding that is not ok has a remedy."""

import pytest
from msgspec.structs import replace
from support.servers.doctor_nodes import CUDA_VERSIONS, GIB, MACHINE, a10g, cpu_node, gpu_node

from cluster.doctor.facts import Filesystem, GpuProcess, Nvidia
from cluster.doctor.judge.gpus import busy_gpus, judge_gpus, judge_unchecked
from cluster.doctor.judge.resources import RAY_FILES, judge_disks, judge_memory, judge_shared_memory

MIB = 2**20


def nvidia(*gpus, driver="580.65.06"):
    return Nvidia(num_devices=len(gpus), driver=driver, gpus=gpus)


def local(node):
    return replace(node, ray_cpus=None, ray_gpus=None)


def worst(findings):
    """(severity, check, message) of each finding that is not ok. Checks the form of all."""
    findings = list(findings)
    assert findings, "every check gives a finding"
    for finding in findings:
        assert bool(finding.remedy) is (finding.severity != "ok"), finding
        assert finding.message.endswith(".") and (not finding.remedy or finding.remedy.endswith(".")), finding
    return [(f.severity.value, f.check, f.message) for f in findings if f.severity != "ok"]


@pytest.mark.parametrize(
    ("node", "device", "expected"),
    [
        pytest.param(gpu_node(), "cuda", [], id="four idle A10G"),
        pytest.param(cpu_node(), "cpu", [], id="no GPU, none needed"),
        pytest.param(cpu_node(), "cuda", [], id="a head node without GPUs"),
        pytest.param(local(cpu_node()), "cuda", [("problem", "gpu", "no NVIDIA GPU")], id="no GPU on the only machine"),
        pytest.param(gpu_node(driver="550.90.07"), "cuda", [("problem", "driver", "needs driver 580")], id="old driver"),
        pytest.param(
            gpu_node(driver="550.90.07", versions=replace(CUDA_VERSIONS, cuda="12.8")), "cuda", [], id="older CUDA too"
        ),
        pytest.param(
            gpu_node(versions=MACHINE.versions), "cuda", [("problem", "driver", "CPU build")], id="CPU build, device cuda"
        ),
        pytest.param(gpu_node(versions=MACHINE.versions), "cpu", [("warning", "driver", "stay idle")], id="CPU build"),
        pytest.param(
            cpu_node(nvidia=Nvidia(num_devices=2, failure="nvidia-smi exited with code 9: no driver")),
            "cpu",
            [("problem", "driver", "nvidia-smi exited with code 9: no driver.")],
            id="broken driver",
        ),
        pytest.param(
            cpu_node(nvidia=Nvidia(failure="nvidia-smi exited with code 9: no driver")), "cpu", [], id="an image with nvidia-smi, no GPU"
        ),
        pytest.param(cpu_node(nvidia=Nvidia(num_devices=2)), "cpu", [("warning", "driver", "nvidia-smi is missing")], id="no nvidia-smi"),
        pytest.param(
            gpu_node(missing_build_tools=("a C compiler (gcc or clang)", "Python.h")),
            "cuda",
            [("warning", "gpu", "Triton, which compiles the GPU kernels, does not find a C compiler (gcc or clang) and Python.h.")],
            id="no compiler",
        ),
        pytest.param(cpu_node(missing_build_tools=("Python.h",)), "cpu", [], id="no compiler, no GPU"),
        pytest.param(replace(gpu_node(), ray_gpus=2.0), "cuda", [("warning", "gpu", "Ray manages only 2")], id="Ray knows fewer"),
        pytest.param(
            gpu_node(nvidia=nvidia(a10g(0), a10g(1, name="Tesla T4", compute_capability=(7, 5))), num_gpus=2),
            "cuda",
            [("warning", "gpu", "NVIDIA A10G, Tesla T4"), ("warning", "gpu", "capability 7.5")],
            id="two kinds",
        ),
        pytest.param(
            gpu_node(nvidia=nvidia(a10g(is_mig=True, compute_mode="Prohibited")), num_gpus=1),
            "cuda",
            [("warning", "gpu", "MIG"), ("problem", "gpu", "Prohibited")],
            id="unusable modes",
        ),
        pytest.param(
            gpu_node(nvidia=nvidia(a10g(free_bytes=9 * GIB, processes=(GpuProcess(pid=7, name="python"),))), num_gpus=1),
            "cuda",
            [("warning", "gpu", "9.0 GiB of 22.5 GiB free")],
            id="another process uses it",
        ),
        pytest.param(
            gpu_node(nvidia=nvidia(a10g(free_bytes=2 * GIB, processes=(GpuProcess(pid=7, name="ray::RankActor"),))), num_gpus=1),
            "cuda",
            [],
            id="a running replica uses it",
        ),
        pytest.param(
            gpu_node(nvidia=nvidia(a10g(free_bytes=None)), num_gpus=1), "cuda", [], id="memory not reported"
        ),
    ],
)  # fmt: skip
def test_gpus(node, device, expected):
    found = worst(judge_gpus(node, device=device))
    assert [(severity, check) for severity, check, _ in found] == [(severity, check) for severity, check, _ in expected]
    for (_, _, sentence), (_, _, part) in zip(found, expected, strict=True):
        assert part in sentence


@pytest.mark.parametrize(
    ("node", "device", "said"),
    [
        (cpu_node(), "cpu", "Not checked without a GPU: "),
        (cpu_node(), "cuda", "Not checked without a GPU: "),
        (gpu_node(), "cpu", "Not checked without a GPU: "),
        (gpu_node(), "cuda", "Not checked: what the GPUs compute"),
    ],
)
def test_what_is_left_open_is_said_in_one_line(node, device, said):
    finding = judge_unchecked([node], device=device)
    assert worst([finding]) == [], "it does not make a machine without a GPU fail --strict"
    assert finding.message.startswith(said) and "`tramontane doctor --gpu`" in finding.message


@pytest.mark.parametrize(
    ("rank_bytes", "free", "severity"),
    [
        (14 * GIB, 22 * GIB, "ok"),
        (14 * GIB, 10 * GIB, "problem"),
        (28 * GIB, 22 * GIB, "problem"),
        (7 * GIB, 10 * GIB, "warning"),
    ],
)
def test_whether_the_weights_of_a_rank_fit(rank_bytes, free, severity):
    node = gpu_node(nvidia=nvidia(a10g(free_bytes=free)), num_gpus=1)
    (_, memory) = judge_gpus(node, device="cuda", rank_bytes=rank_bytes)
    assert memory.severity == severity, memory


def test_the_processes_on_a_gpu_are_in_the_remedy():
    node = gpu_node(nvidia=nvidia(a10g(free_bytes=GIB, processes=(GpuProcess(pid=4711, name="jupyter"),))), num_gpus=1)
    assert "4711 (jupyter)" in list(judge_gpus(node, device="cuda"))[-1].remedy
    assert busy_gpus(node) == [0] and busy_gpus(gpu_node()) == [] == busy_gpus(cpu_node())


@pytest.mark.parametrize(
    ("free", "device", "num_ranks", "rank_bytes", "severity"),
    [
        (60 * GIB, "cpu", 2, 14 * GIB, "ok"),
        (20 * GIB, "cpu", 2, 14 * GIB, "warning"),  # enough for one rank, not for both
        (14 * GIB, "cpu", 1, 14 * GIB, "problem"),  # enough for the weights, not for the KV cache
        (14 * GIB, "cuda", 1, 14 * GIB, "ok"),  # on a GPU the weights only pass through host memory
        (1 * GIB, "cuda", 1, None, "warning"),
        (None, "cpu", 1, None, "ok"),
    ],
)
def test_memory(free, device, num_ranks, rank_bytes, severity):
    finding = judge_memory(cpu_node(free_memory_bytes=free), device=device, num_ranks=num_ranks, rank_bytes=rank_bytes)
    worst([finding])
    assert finding.severity == severity, finding


def shm(free, total=64 * MIB):
    return Filesystem(path="/dev/shm", purpose="", total_bytes=total, free_bytes=free)


@pytest.mark.parametrize(
    ("node", "device", "severity", "said"),
    [
        (cpu_node(), "cpu", "ok", "32.0 GiB"),
        (cpu_node(shm=shm(64 * MIB)), "cpu", "ok", "64.0 MiB"),
        (cpu_node(shm=shm(3 * MIB)), "cpu", "problem", "2 ranks need 4.0 MiB"),
        (cpu_node(shm=None), "cpu", "warning", "Gloo"),
        (gpu_node(shm=shm(64 * MIB)), "cuda", "warning", "NCCL needs about 1.0 GiB for 4 GPUs"),
        (gpu_node(num_gpus=1, shm=shm(64 * MIB)), "cuda", "ok", ""),
    ],
)
def test_shared_memory(node, device, severity, said):
    finding = judge_shared_memory(node, device=device, num_ranks=2)
    worst([finding])
    assert finding.severity == severity and said in finding.message, finding


@pytest.mark.parametrize(
    ("free", "total", "purpose", "severity"),
    [
        (50 * GIB, 100 * GIB, RAY_FILES, "ok"),
        (4 * GIB, 100 * GIB, RAY_FILES, "problem"),  # 96 % full: Ray stops
        (40 * GIB, 1000 * GIB, "files and batches", "ok"),
        (4 * GIB, 20 * GIB, RAY_FILES, "warning"),
        (4 * GIB, 1000 * GIB, "files and batches", "warning"),
        (GIB // 2, 5 * GIB, "files and batches", "problem"),
    ],
)
def test_disks(free, total, purpose, severity):
    disk = Filesystem(path="/d", purpose=purpose, total_bytes=total, free_bytes=free)
    (finding,) = judge_disks(cpu_node(disks=(disk,)))
    worst([finding])
    assert finding.severity == severity, finding
