"""Reads the facts about one machine: versions, memory, filesystems, network. Runs on every node.

Imports no torch and starts no process except nvidia-smi. What cannot be read is left unknown; what that means is decided in judge/.
"""

import contextlib
import os
import platform
import shutil
import socket
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from cluster.doctor.facts import CpuKernels, Fault, Filesystem, Machine, Network, Versions
from cluster.doctor.nvidia import read_nvidia
from workers.device.cpu import read_cpu
from workers.device.memory import read_memory
from workers.device.probe import torch_build
from workers.errors import ConfigError
from workers.native.bfloat16 import bfloat16_support
from workers.native.library import NoNativeLibrary, load_library

SHM = Path("/dev/shm")
ROOT = Path("/")


def read_machine(disks: Mapping[str, str]) -> Machine:
    """disks: what each path is used for. A path does not have to exist yet."""
    memory, cpu = read_memory(), read_cpu()
    return Machine(
        num_cpus=cpu.num_cores,
        has_bfloat16=_has_bfloat16(),
        memory_bytes=None if memory is None else memory.total_bytes,
        free_memory_bytes=None if memory is None else memory.available_bytes,
        versions=read_versions(),
        nvidia=read_nvidia(),
        shm=read_filesystem(SHM, "the ranks of one host") if SHM.is_dir() else None,
        disks=tuple(read_filesystem(Path(path), purpose) for path, purpose in disks.items()),
        network=read_network(),
        missing_build_tools=tuple(_missing_build_tools()),
        cpu_kernels=read_cpu_kernels(),
    )


def _has_bfloat16() -> bool:
    try:
        return bfloat16_support().obstacle is None
    except ConfigError:  # which `read_cpu_kernels` reports
        return False


def read_cpu_kernels() -> CpuKernels:
    try:
        library = load_library()
    except ConfigError as e:
        return CpuKernels(fault=Fault(message=e.message, remedy=e.remedy or ""))
    if isinstance(library, NoNativeLibrary):
        return CpuKernels(reason=library.reason)
    return CpuKernels(variant=library.variant, build_id=library.build_id)


def _missing_build_tools() -> Iterator[str]:
    """As Triton looks for them."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        yield "a C compiler (gcc or clang)"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(include) / "Python.h").is_file():
        yield "Python.h"


def read_versions() -> Versions:
    return Versions(
        tramontane=_version("tramontane"),
        python=platform.python_version(),
        torch=_version("torch"),
        ray=_version("ray"),
        cuda=torch_build()[1],
        nccl=next((d.version for d in distributions() if (d.name or "").lower().startswith("nvidia-nccl-cu")), None),
    )


def read_filesystem(path: Path, purpose: str) -> Filesystem:
    """The filesystem of the folder, or of the folder it will be created in."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    usage = shutil.disk_usage(existing)
    return Filesystem(path=str(path), purpose=purpose, total_bytes=usage.total, free_bytes=usage.free)


def read_network(root: Path = ROOT) -> Network:
    from workers.parallel.interface import addresses

    hostname = socket.gethostname()
    own: str | None = None
    with contextlib.suppress(OSError):
        own = socket.gethostbyname(hostname)
    ports: tuple[int, int] | None = None
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, (root / "proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        ports = low, high
    stack: str | None = None
    with contextlib.suppress(OSError):
        boot_id = (root / "proc/sys/kernel/random/boot_id").read_text().strip()
        stack = f"{boot_id} {(root / 'proc/self/ns/net').readlink()}"
    return Network(
        stack=stack,
        interfaces=addresses(),
        hostname=hostname,
        hostname_address=own,
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME"),
        nccl_interface=os.environ.get("NCCL_SOCKET_IFNAME"),
        ephemeral_ports=ports,
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
