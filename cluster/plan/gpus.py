"""The GPUs that `plan` knows: memory, bandwidth, arithmetic and the link between them, each with its source.

The names are SkyPilot's. Only GPUs that can run the CUDA attention kernel (Ampere and newer). Knows no model, no cloud and no price.
"""

import re
from dataclasses import dataclass, replace

from workers.device.sizes import Sizes, sizes_of_gpu
from workers.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link between the GPUs of one machine.

    bytes_per_s: of one GPU in one direction, as NCCL reaches it. latency_s: of one small all-reduce, including the launch. Both are
    rounded from published nccl-tests results on such machines; we have not measured them.
    """

    name: str
    bytes_per_s: float
    latency_s: float


# The clouds' PCIe machines have no peer-to-peer copies, so data goes through host memory.
PCIE = Link(name="PCIe 4.0 x16", bytes_per_s=10e9, latency_s=30e-6)
NVLINK_3 = Link(name="NVLink 3", bytes_per_s=230e9, latency_s=15e-6)
NVLINK_4 = Link(name="NVLink 4", bytes_per_s=360e9, latency_s=15e-6)
NVLINK_5 = Link(name="NVLink 5", bytes_per_s=700e9, latency_s=15e-6)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    memory_bytes: the total the driver reports (the lowest in public reports), less than the nominal size because of ECC.
    flops_per_s: dense bfloat16 or float16 with float32 accumulation. Bandwidth and FLOP/s are from the data sheet.
    """

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    bytes_per_s: float
    flops_per_s: float
    link: Link
    source: str

    @property
    def sizes(self) -> Sizes:
        """The engine sizes that ranks choose on it."""
        return sizes_of_gpu(memory_bytes=self.memory_bytes, compute_capability=self.compute_capability)

    def in_float8(self) -> "Gpu":
        """As it multiplies 8-bit floats: twice as fast, from compute capability 8.9 on. Older ones multiply them in 16 bits."""
        return replace(self, flops_per_s=2 * self.flops_per_s) if self.compute_capability >= (8, 9) else self


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="A10G",
            memory_bytes=int(21.98 * GIB),
            compute_capability=(8, 6),
            bytes_per_s=600e9,
            flops_per_s=70e12,
            link=PCIE,
            source="NVIDIA A10G data sheet (AWS G5)",
        ),
        Gpu(
            name="A10",
            memory_bytes=int(21.98 * GIB),
            compute_capability=(8, 6),
            bytes_per_s=600e9,
            flops_per_s=125e12,
            link=PCIE,
            source="NVIDIA A10 data sheet",
        ),
        Gpu(
            name="L4",
            memory_bytes=int(21.95 * GIB),
            compute_capability=(8, 9),
            bytes_per_s=300e9,
            flops_per_s=121e12,
            link=PCIE,
            source="NVIDIA L4 data sheet, half of its figure with sparsity",
        ),
        Gpu(
            name="L40S",
            memory_bytes=int(44.39 * GIB),
            compute_capability=(8, 9),
            bytes_per_s=864e9,
            flops_per_s=362e12,
            link=PCIE,
            source="NVIDIA L40S data sheet",
        ),
        Gpu(
            name="A100",
            memory_bytes=int(39.39 * GIB),
            compute_capability=(8, 0),
            bytes_per_s=1555e9,
            flops_per_s=312e12,
            link=NVLINK_3,
            source="NVIDIA A100 data sheet, 40 GB SXM",
        ),
        Gpu(
            name="A100-80GB",
            memory_bytes=int(79.14 * GIB),
            compute_capability=(8, 0),
            bytes_per_s=1935e9,
            flops_per_s=312e12,
            link=NVLINK_3,
            source="NVIDIA A100 data sheet, 80 GB PCIe; SXM reads 5 % faster",
        ),
        Gpu(
            name="H100",
            memory_bytes=int(79.1 * GIB),
            compute_capability=(9, 0),
            bytes_per_s=3350e9,
            flops_per_s=989e12,
            link=NVLINK_4,
            source="NVIDIA H100 data sheet, SXM, half of its figure with sparsity",
        ),
        Gpu(
            name="H200",
            memory_bytes=int(139.8 * GIB),
            compute_capability=(9, 0),
            bytes_per_s=4800e9,
            flops_per_s=989e12,
            link=NVLINK_4,
            source="NVIDIA H200 data sheet, SXM, half of its figure with sparsity",
        ),
        Gpu(
            name="B200",
            memory_bytes=int(178.3 * GIB),
            compute_capability=(10, 0),
            bytes_per_s=7700e9,
            flops_per_s=2250e12,
            link=NVLINK_5,
            source="NVIDIA HGX B200 data sheet, half of its figure with sparsity",
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU with SkyPilot's name, in any case. Raises ConfigError that lists the known names."""
    for known, gpu in GPUS.items():
        if known.lower() == name.strip().lower():
            return gpu
    raise ConfigError(f"--gpu {name} is not known.", remedy=f"Use one of {', '.join(GPUS)}, or cpu.", param="--gpu")


def find_gpus(text: str) -> tuple[Gpu, int | None]:
    """ "A10G" is any number of them, "A10G:4" four in one machine, as SkyPilot writes it. Raises ConfigError."""
    name, colon, count = text.partition(":")
    gpu = find_gpu(name)
    if not colon:
        return gpu, None
    if not re.fullmatch(r"[1-9]\d?", count.strip()):
        raise ConfigError(
            f"--gpu {text} has no number of GPUs after the colon.", remedy=f"Write it like {gpu.name}:4.", param="--gpu"
        )
    return gpu, int(count)
