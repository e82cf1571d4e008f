"""What a GPU's sensors say, through the calls of CUDA and NVML; the libraries are imitated, no GPU is needed."""

from ctypes import CDLL
from typing import Any

import pytest

from workers.device.sensors import GpuReading, open_sensors


class Cuda:
    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index + 7
        return 0

    def cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> int:
        assert device.value == 7, "the first that this process sees"
        text.value = b"00000000:3B:00.0"
        return 0


class Nvml:
    """`failing`: the functions that return an error."""

    def __init__(self, *failing: str) -> None:
        self._failing = failing

    def nvmlInit_v2(self) -> int:
        return "nvmlInit_v2" in self._failing

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id: Any, handle: Any) -> int:
        assert bus_id.value == b"00000000:3B:00.0"
        handle._obj.value = 5
        return "nvmlDeviceGetHandleByPciBusId_v2" in self._failing

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        assert handle.value == 5
        memory._obj.total, memory._obj.used = 24 << 30, 21 << 30
        return "nvmlDeviceGetMemoryInfo" in self._failing

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, temperature: Any) -> int:
        assert (handle.value, sensor) == (5, 0)
        temperature._obj.value = 61
        return "nvmlDeviceGetTemperature" in self._failing


def libraries(nvml: Nvml) -> Any:
    return lambda name: {"libcuda.so.1": Cuda(), "libnvidia-ml.so.1": nvml}[name]


@pytest.mark.parametrize(("failing", "temperature_c"), [((), 61), (("nvmlDeviceGetTemperature",), None)])
def test_a_reading(failing: tuple[str, ...], temperature_c: int | None) -> None:
    sensors = open_sensors("NVIDIA A10G", libraries(Nvml(*failing)))
    assert sensors is not None
    whole = GpuReading(name="NVIDIA A10G", used_bytes=21 << 30, total_bytes=24 << 30, temperature_c=temperature_c)
    assert sensors.read() == whole


def test_no_reading_where_the_driver_gives_none() -> None:
    assert open_sensors("x", lambda _: CDLL("libno-such-library.so")) is None
    for failing in ("nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2"):
        assert open_sensors("x", libraries(Nvml(failing))) is None
    sensors = open_sensors("x", libraries(Nvml("nvmlDeviceGetMemoryInfo")))
    assert sensors is not None and sensors.read() is None
