"""Which GPUs torch can use in this process and, if none, why: one sentence, and what to do about it.

Asks the driver through libcuda and reads the CUDA release of torch from its files. Imports no torch and keeps no memory on a GPU. Without
a driver it takes microseconds. Knows nothing about models, Ray or options.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# The oldest driver for each major release of CUDA; it runs every minor release of it ("minor version compatibility").
MIN_DRIVERS = {11: 450, 12: 525, 13: 580}
VISIBLE_ENV = "CUDA_VISIBLE_DEVICES"
CUDA_ERROR_NO_DEVICE = 100
NVIDIA_PCI_VENDOR, DISPLAY_PCI_CLASS = "0x10de", "0x03"
# Attributes of cuDeviceGetAttribute.
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """One GPU as the driver describes it. memory_bytes: its whole memory."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]

    def describe(self) -> str:
        """ "NVIDIA A10G, 22.0 GiB"."""
        return f"{self.name}, {self.memory_bytes / 2**30:.1f} GiB"


@dataclass(frozen=True, kw_only=True)
class DriverFacts:
    """What libcuda says. cuda: the newest CUDA release that it runs. error: why it cannot start, its code and words; None if it can."""

    cuda: tuple[int, int]
    devices: tuple[CudaDevice, ...] = ()
    error: tuple[int, str] | None = None


@dataclass(frozen=True, kw_only=True)
class CudaFacts:
    """driver: None if libcuda cannot be loaded. has_gpu: whether this machine has an NVIDIA GPU, usable or not.

    visible: the value of CUDA_VISIBLE_DEVICES. torch, torch_cuda: torch's release and the CUDA release that it was built with; None for
    no torch and for a build without CUDA.
    """

    driver: DriverFacts | None
    has_gpu: bool
    visible: str | None
    torch: str | None
    torch_cuda: str | None


@dataclass(frozen=True, kw_only=True)
class NoGpu:
    """Why torch can use no GPU here. has_gpu: there is one, so that computing on the CPU deserves a word."""

    message: str
    remedy: str
    has_gpu: bool


def probe() -> tuple[CudaDevice, ...] | NoGpu:
    """The GPUs that torch can use in this process, in torch's order; at least one, otherwise why there is none."""
    return judge(read_facts())


def judge(facts: CudaFacts) -> tuple[CudaDevice, ...] | NoGpu:
    """The first thing that keeps torch from every GPU, from the hardware up to torch; the GPUs if nothing does."""
    fault = _fault(facts)
    if fault is not None:
        found = facts.driver is not None and bool(facts.driver.devices)
        return NoGpu(message=fault[0], remedy=fault[1], has_gpu=facts.has_gpu or found)
    assert facts.driver is not None and facts.driver.devices, "what lacks these is a fault"
    return facts.driver.devices


def read_facts(root: Path = Path("/")) -> CudaFacts:
    """root: where dev/ and sys/ are."""
    torch, torch_cuda = torch_build()
    return CudaFacts(
        driver=read_driver(),
        has_gpu=_has_gpu(root),
        visible=os.environ.get(VISIBLE_ENV),
        torch=torch,
        torch_cuda=torch_cuda,
    )


def torch_build() -> tuple[str | None, str | None]:
    """torch's release and the CUDA release it was built with, read from its files: importing it takes seconds and much memory."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        with contextlib.suppress(OSError):
            text = (Path(folder) / "version.py").read_text()
            return _assigned("__version__", text), _assigned("cuda", text)
    return None, None


def read_driver(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> DriverFacts | None:
    """None if there is no libcuda. load: raises OSError for a library that is not there."""
    try:
        cuda = load("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    release = version.value // 1000, version.value % 1000 // 10
    if code := cuda.cuInit(0):
        return DriverFacts(cuda=release, error=(code, _error_words(cuda, code)))
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return DriverFacts(cuda=release, devices=tuple(_device(cuda, index) for index in range(count.value)))


def _device(cuda: ctypes.CDLL, index: int) -> CudaDevice:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return CudaDevice(
        name=name.value.decode(errors="replace"),
        memory_bytes=memory.value,
        compute_capability=(attribute(COMPUTE_CAPABILITY_MAJOR), attribute(COMPUTE_CAPABILITY_MINOR)),
    )


def _error_words(cuda: ctypes.CDLL, code: int) -> str:
    words = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(words))
    return (words.value or b"unknown error").decode(errors="replace")


def _assigned(name: str, text: str) -> str | None:
    """The string that a line of Python assigns to `name`."""
    match = re.search(rf"^{name}\b.*=\s*'([^']+)'", text, re.MULTILINE)
    return None if match is None else match[1]


def _has_gpu(root: Path) -> bool:
    if any(path.name.removeprefix("nvidia").isdigit() for path in (root / "dev").glob("nvidia[0-9]*")):
        return True
    for device in (root / "sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == NVIDIA_PCI_VENDOR and kind.startswith(DISPLAY_PCI_CLASS):
                return True
    return False


def _fault(facts: CudaFacts) -> tuple[str, str] | None:
    """The message and the remedy."""
    driver = facts.driver
    if driver is None and not facts.has_gpu:
        return (
            "This machine has no NVIDIA GPU.",
            "Use a machine with one, or --device cpu. A container needs `docker run --gpus all`.",
        )
    if driver is None:
        return (
            "This machine has an NVIDIA GPU, but no NVIDIA driver was found: libcuda.so.1 is missing.",
            "Install the driver, or use --device cpu. A container needs the NVIDIA Container Toolkit and "
            "`docker run --gpus all`.",
        )
    no_device = driver.error is not None and driver.error[0] == CUDA_ERROR_NO_DEVICE
    if (no_device or (driver.error is None and not driver.devices)) and facts.visible is not None:
        return (
            f"No GPU is visible, because {VISIBLE_ENV} is {facts.visible!r}.",
            f"Unset {VISIBLE_ENV} or set it to the number of a GPU, or use --device cpu.",
        )
    if no_device or (driver.error is None and not driver.devices):
        return (
            "The NVIDIA driver finds no GPU.",
            "Check `nvidia-smi`, or use --device cpu. A container needs `docker run --gpus all`.",
        )
    if driver.error is not None:
        return (
            f"The NVIDIA driver does not work: {driver.error[1]} (error {driver.error[0]}).",
            "Check `nvidia-smi`; after an update of the driver a reboot is often enough. Or use --device cpu.",
        )
    if facts.torch is None:
        return "torch is not installed.", "Install Tramontane there: `pip install tramontane`."
    if facts.torch_cuda is None:
        return (
            f"torch {facts.torch} was built without CUDA and cannot use the GPU.",
            "Install a CUDA build of the same torch release (https://pytorch.org/get-started), or use --device cpu.",
        )
    major = int(facts.torch_cuda.split(".")[0])
    if driver.cuda[0] < major:
        return (
            f"The NVIDIA driver is too old: it runs CUDA {driver.cuda[0]}.{driver.cuda[1]}, and torch {facts.torch} was "
            f"built with CUDA {facts.torch_cuda}.",
            f"Install driver {MIN_DRIVERS.get(major, 'releases of that CUDA')} or newer, or a torch build for CUDA "
            f"{driver.cuda[0]}.",
        )
    return None
