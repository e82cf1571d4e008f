"""Why torch can use no GPU, as sentences; and what is read from the driver, from torch's files and from the machine. No GPU is needed."""

from ctypes import CDLL
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers.device.probe import (
    CudaDevice,
    CudaFacts,
    DriverFacts,
    NoGpu,
    judge,
    read_driver,
    read_facts,
    torch_build,
)

A10G = CudaDevice(name="NVIDIA A10G", memory_bytes=23_603_000_000, compute_capability=(8, 6))
GOOD = CudaFacts(
    driver=DriverFacts(cuda=(13, 0), devices=(A10G,)), has_gpu=True, visible=None, torch="2.13.0", torch_cuda="13.0"
)


def driver(**changes: Any) -> DriverFacts:
    assert GOOD.driver is not None
    return replace(GOOD.driver, **changes)


@pytest.mark.parametrize(
    ("facts", "message", "remedy"),
    [
        pytest.param(
            replace(GOOD, driver=None, has_gpu=False, torch_cuda=None), "This machine has no NVIDIA GPU.", "--device cpu", id="no GPU"
        ),
        pytest.param(
            replace(GOOD, driver=None),
            "This machine has an NVIDIA GPU, but no NVIDIA driver was found: libcuda.so.1 is missing.",
            "Install the driver",
            id="no driver",
        ),
        pytest.param(
            replace(GOOD, driver=driver(devices=(), error=(100, "no device")), visible=""),
            "No GPU is visible, because CUDA_VISIBLE_DEVICES is ''.",
            "Unset CUDA_VISIBLE_DEVICES",
            id="hidden",
        ),
        pytest.param(
            replace(GOOD, driver=driver(devices=()), visible="7"), "CUDA_VISIBLE_DEVICES is '7'", "Unset", id="a number too high"
        ),
        pytest.param(
            replace(GOOD, driver=driver(devices=(), error=(100, "no device"))), "driver finds no GPU.", "nvidia-smi", id="no device"
        ),
        pytest.param(
            replace(GOOD, driver=driver(devices=(), error=(803, "system has unsupported display driver / cuda driver combination"))),
            "The NVIDIA driver does not work: system has unsupported display driver / cuda driver combination (error 803).",
            "reboot",
            id="half an update",
        ),
        pytest.param(replace(GOOD, torch=None, torch_cuda=None), "torch is not installed.", "pip install", id="no torch"),
        pytest.param(
            replace(GOOD, torch="2.13.0+cpu", torch_cuda=None),
            "torch 2.13.0+cpu was built without CUDA and cannot use the GPU.",
            "Install a CUDA build of the same torch release",
            id="CPU build",
        ),
        pytest.param(
            replace(GOOD, driver=driver(cuda=(12, 4))),
            "The NVIDIA driver is too old: it runs CUDA 12.4, and torch 2.13.0 was built with CUDA 13.0.",
            "Install driver 580 or newer, or a torch build for CUDA 12.",
            id="old driver",
        ),
    ],
)  # fmt: skip
def test_why_there_is_no_gpu(facts: CudaFacts, message: str, remedy: str) -> None:
    found = judge(facts)
    assert isinstance(found, NoGpu), found
    assert message in found.message and remedy in found.remedy
    assert found.message.endswith(".") and found.remedy.endswith(".")
    assert found.has_gpu is facts.has_gpu


@pytest.mark.parametrize(
    "facts",
    [
        GOOD,
        replace(GOOD, visible="0"),
        replace(GOOD, driver=driver(cuda=(13, 2))),
        replace(GOOD, driver=driver(cuda=(12, 2)), torch_cuda="12.8"),  # every minor release of its major
        replace(GOOD, has_gpu=False),  # where neither /dev nor the PCI bus shows it
    ],
)
def test_a_gpu_that_torch_can_use(facts: CudaFacts) -> None:
    assert judge(facts) == (A10G,)


class FakeCuda:
    """libcuda's functions on two GPUs; `error` is what cuInit returns."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = 13_020

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuGetErrorString(self, code: int, words: Any) -> None:
        words._obj.value = b"unknown error"

    def cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = 2

    def cuDeviceGet(self, device: Any, index: int) -> None:
        device._obj.value = index + 10

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        name.value = f"GPU {device.value}".encode()

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> None:
        memory._obj.value = device.value << 32

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> None:
        value._obj.value = {75: 8, 76: 6}[number]


def test_what_the_driver_says() -> None:
    found = read_driver(lambda _: FakeCuda())
    devices = tuple(CudaDevice(name=f"GPU {i}", memory_bytes=i << 32, compute_capability=(8, 6)) for i in (10, 11))
    assert found == DriverFacts(cuda=(13, 2), devices=devices)
    assert devices[0].describe() == "GPU 10, 40.0 GiB"
    assert read_driver(lambda _: FakeCuda(999)) == DriverFacts(cuda=(13, 2), error=(999, "unknown error"))
    assert read_driver(lambda _: CDLL("libno-such-library.so")) is None


@pytest.mark.parametrize(
    ("line", "cuda"), [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", None)]
)
def test_the_build_of_torch_is_read_without_importing_it(
    line: str, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch_build() == (torch.__version__, torch.version.cuda)
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ndebug = False\n{line}\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("workers.device.probe.find_spec", lambda _: spec)
    assert torch_build() == ("2.13.0", cuda)
    monkeypatch.setattr("workers.device.probe.find_spec", lambda _: None)
    assert torch_build() == (None, None)


def test_a_gpu_is_seen_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (read_facts(tmp_path).has_gpu, read_facts(tmp_path).visible) == (False, "")
    device = tmp_path / "sys/bus/pci/devices/0000:00:1e.0"
    device.mkdir(parents=True)
    for vendor, kind, has_gpu in (
        ("0x10de", "0x030200", True),
        ("0x10de", "0x040300", False),
        ("0x1d0f", "0x030000", False),
    ):
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
        assert read_facts(tmp_path).has_gpu is has_gpu, (vendor, kind)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not read_facts(tmp_path).has_gpu
    (tmp_path / "dev/nvidia0").touch()
    assert read_facts(tmp_path).has_gpu
