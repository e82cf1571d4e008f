"""What a GPU says of itself while it works: memory in use, and temperature. Asks NVML, the driver's library; microseconds, no memory on
the GPU, no torch. Without the library, or for a GPU that it does not know, there are no readings.
"""

import ctypes
from collections.abc import Callable

import msgspec

TEMPERATURE_OF_GPU = 0  # NVML_TEMPERATURE_GPU


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
    """`used_bytes`: by all processes. `temperature_c`: of the chip, in degrees Celsius; None if it has no such sensor."""

    name: str
    used_bytes: int
    total_bytes: int
    temperature_c: int | None = None


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Sensors:
    """Of one GPU; `open_sensors` makes it."""

    def __init__(self, name: str, nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._name = name
        self._nvml = nvml
        self._handle = handle

    def read(self) -> GpuReading | None:
        """None if the driver does not answer."""
        memory, temperature = _Memory(), ctypes.c_uint()
        if self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)):
            return None
        failed = self._nvml.nvmlDeviceGetTemperature(self._handle, TEMPERATURE_OF_GPU, ctypes.byref(temperature))
        return GpuReading(
            name=self._name,
            used_bytes=memory.used,
            total_bytes=memory.total,
            temperature_c=None if failed else temperature.value,
        )


def open_sensors(name: str, load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> Sensors | None:
    """Of the first GPU that CUDA shows to this process, which NVML may number differently. load: raises OSError for a missing library."""
    try:
        cuda, nvml = load("libcuda.so.1"), load("libnvidia-ml.so.1")
    except OSError:
        return None
    device, bus_id, handle = ctypes.c_int(), ctypes.create_string_buffer(32), ctypes.c_void_p()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if cuda.cuDeviceGetPCIBusId(bus_id, len(bus_id), device) or nvml.nvmlInit_v2():
        return None
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)):
        return None
    return Sensors(name, nvml, handle)
